"""Networks whose weights lie as generation reads them fastest, if wanted in fewer bits.

What takes the time of a token is reading the weights. Here they lie in the order in which oneDNN, torch's own library
for CPUs, multiplies them.

Shapes: B rows, K inputs, N outputs of a linear layer.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.errors import UserError, setting
from lm.models import GPT, Seq2Seq
from lm.models.rotary import Rotary

Dtype = Literal["float32", "bfloat16", "int8"]
MULTIPLE = 32
"""The kernel for 8-bit integers takes multiples of it, both of K and of N."""
FEWEST_ROWS = 4
"""A single row takes oneDNN longer than four, and is rounded otherwise."""


class PackedLinear(nn.Module):
    """A linear layer on a CPU, of float32 or bfloat16.

    The bits of a row do not depend on how many rows there are, on the processors seen so far.

    Args:
        linear: The layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        kernels: Any = torch.ops.mkldnn
        self.multiply = kernels._linear_pointwise.default
        self.weight = kernels._reorder_linear_weight(linear.weight.detach(), None)  # opaque: for this kernel alone
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        if x.numel() != x.shape[-1]:
            y: Tensor = self.multiply(x, self.weight, self.bias, "none", [], "")
            return y
        y = self.multiply(x.expand(FEWEST_ROWS, *x.shape[1:]), self.weight, self.bias, "none", [], "")
        return y[:1]


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers, with a scale for each output; activations are bfloat16.

    A weight w of output n becomes round(w / s_n), where s_n = max |w| / 127 over the output's weights: an error of at
    most s_n / 2.

    Args:
        linear: The layer; K is a multiple of 32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()  # (N, K)
        weight = F.pad(weight, (0, 0, 0, -len(weight) % MULTIPLE))
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (N,)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])  # (B, K)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)  # (B, K) @ (K, N) -> (B, N)
        y = y[:, : self.out_features].unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def packed(net: nn.Module, dtype: Dtype = "float32") -> nn.Module:
    """Return a network for generation alone, in the given one's place.

    Linear layers are packed in GPT and Seq2Seq, which do nothing but call them. With int8 they hold integers where the
    kernel takes their sizes; all else is bfloat16. Rotary angles stay in 32 bits: a position of some hundreds has no
    place in bfloat16's eight.

    Raises:
        UserError: int8 on a device other than a CPU.
    """
    on_cpu = next(net.parameters()).device.type == "cpu"
    if dtype == "int8" and not on_cpu:
        raise UserError(f"{setting('dtype')} int8 is for CPUs: say bfloat16")
    only_called = isinstance(net, GPT | Seq2Seq)
    if dtype == "int8" and only_called:
        _replace(net, nn.Linear, lambda linear: Int8Linear(linear) if linear.in_features % MULTIPLE == 0 else linear)
    if dtype != "float32":
        angles = [(module, module.cos, module.sin) for module in net.modules() if isinstance(module, Rotary)]
        net = net.to(torch.bfloat16)  # integers stay
        for module, cos, sin in angles:
            module.cos, module.sin = cos, sin
    if on_cpu and only_called and torch.backends.mkldnn.is_available():
        kinds = {torch.float32, torch.bfloat16} if has_instructions() else {torch.float32}
        _replace(net, nn.Linear, lambda linear: PackedLinear(linear) if linear.weight.dtype in kinds else linear)
    _replace(net, nn.Dropout, lambda dropout: nn.Identity())  # a call saved
    return net


def _replace(net: nn.Module, kind: type[nn.Module], new: Callable[[Any], nn.Module]) -> None:
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is kind:
                setattr(parent, name, new(layer))


def has_instructions() -> bool:
    """Return whether this CPU multiplies bfloat16: without, smaller numbers take longer than float32."""
    kernels: Any = torch.ops.mkldnn
    return bool(kernels._is_mkldnn_bf16_supported())
