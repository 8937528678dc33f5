"""Layers that work in parts in training, against torch's own in float64, forwards and backwards."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lm.models import parts
from lm.models.feed_forward import GELU
from lm.models.norms import RMSNorm
from lm.models.rotary import Rotary

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: GELU(approximate="tanh"),
    "rms": lambda: RMSNorm(8, eps=1e-5),
    "rms of default eps": lambda: RMSNorm(8),
    "rotary": lambda: Rotary(head_size=8, block_size=7),
}


@pytest.mark.parametrize("part", [1 << 17, 100, 1], ids=["whole", "in parts", "by rows"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_they_are_torchs_own(
    name: str, dtype: torch.dtype, tolerance: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", part)
    torch.manual_seed(1)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = (2 * torch.randn(3, 6, 5, 8)).transpose(1, 2).to(dtype).requires_grad_()  # as heads are: not contiguous
    dy = torch.randn(3, 5, 6, 8, dtype=dtype)
    y = layer(x)
    assert "Backward" in y.grad_fn.name() and y.dtype == dtype
    found = [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)  # as networks evaluate and generate
    wide = x.detach().double().requires_grad_()
    y = layer.double()(wide)
    wanted = [y, *torch.autograd.grad(y, [wide, *layer.parameters()], dy.double())]
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_they_are_used_in_training_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, used = LAYERS[name](), []
    monkeypatch.setattr(parts, "in_parts", lambda function, *tensors: used.append(function(*tensors)))
    x = torch.randn(2, 7, 8)
    layer(x)
    layer.double()(x.double().requires_grad_())
    assert not used
    layer.float()(x.requires_grad_())
    assert used
