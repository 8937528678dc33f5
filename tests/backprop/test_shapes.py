"""Shapes that nobody thought of: batch, time, widths and heads drawn by Hypothesis, in float64 against autograd."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lm.backprop import Gradients, run
from lm.backprop.attention import attend
from lm.backprop.linear import convolution
from lm.backprop.loss import cross_entropy
from lm.models import GPT, GatedWaveNet, Seq2Seq, WaveNet
from lm.models.layers import BatchNorm
from tests.support.gradients import V, assert_same

few = settings(max_examples=40, deadline=None, derandomize=True)
size = st.integers(1, 6)
leading = st.lists(size, min_size=1, max_size=3)


def assert_layer(layer: nn.Module, x: torch.Tensor) -> None:
    layer = layer.double()
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    with torch.no_grad():
        _, backward = run(layer, Gradients(), x)
        found = [backward(dy), *(p.grad for p in layer.parameters())]
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@few
@given(leading, size, size, st.booleans())
def test_linear(shape: list[int], fan_in: int, fan_out: int, bias: bool) -> None:
    assert_layer(nn.Linear(fan_in, fan_out, bias=bias), torch.randn(*shape, fan_in, dtype=torch.float64))


@few
@given(leading, st.integers(2, 9), st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
def test_norms(shape: list[int], channels: int, kind: type[nn.Module]) -> None:
    assert_layer(kind(channels), torch.randn(*shape, channels, dtype=torch.float64))


@few
@given(st.integers(2, 9), st.none() | size, size, st.booleans())
def test_batch_norm(B: int, T: int | None, C: int, bessel: bool) -> None:
    x = torch.randn(*([B, C] if T is None else [B, T, C]), dtype=torch.float64)
    assert_layer(BatchNorm(C, bessel=bessel), x)
    if T is not None:
        assert_layer(BatchNorm(C, n_positions=T, bessel=bessel), x.detach())


@few
@given(size, size, size, st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_convolution(B: int, fan_in: int, fan_out: int, taps: int, dilation: int, more: int) -> None:
    x = torch.randn(B, fan_in, (taps - 1) * dilation + 1 + more, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(fan_out, fan_in, taps, dtype=torch.float64, requires_grad=True)
    y = F.conv1d(x, kernel, dilation=dilation)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, kernel), dy)
    with torch.no_grad():
        found = convolution(x, kernel, dilation)[1](dy)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@few
@given(size, size, st.integers(1, 40), size, st.integers(0, 2))
def test_attention(B: int, H: int, T: int, D: int, kind: int) -> None:
    q, k, v = (torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    allowed = None if kind == 0 else torch.rand(B, 1, T, T) < 0.5 if kind == 1 else torch.ones(T, T, dtype=torch.bool)
    if allowed is not None and kind == 1:
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (q, k, v), dy)
    with torch.no_grad():
        again, backward = attend(q, k, v, allowed)
        found = backward(dy)
    for a, b in zip([y, *wanted], [again, *found], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@few
@given(leading, st.integers(2, 9), st.integers(-1, 1000))
def test_cross_entropy(shape: list[int], vocabulary: int, ignored: int) -> None:
    logits = torch.randn(*shape, vocabulary, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocabulary, shape)
    if targets.numel() > 1:
        targets.view(-1)[ignored % targets.numel()] = -100
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    found, dlogits = cross_entropy(logits.detach(), targets)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dlogits, torch.autograd.grad(loss, logits)[0], rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size, size, st.integers(1, 2), st.sampled_from([1, 2, 4]), st.booleans())
def test_networks(B: int, time: int, n_layer: int, n_head: int, today: bool) -> None:
    torch.manual_seed(B + 10 * time)
    modern = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "n_kv_head": 1, "qk_norm": True}
    common = {"n_layer": n_layer, "n_head": n_head, "n_embd": 8}
    nets = [
        GPT(V, 6, **common, **(modern if today else {})),
        Seq2Seq(V, 6, **common, start_token=1),
        GatedWaveNet(V, 6, n_embd=3, n_layer=n_layer),
        WaveNet(V, 6, n_embd=3, n_hidden=4, depth=2, dense=True).eval(),
    ]
    for net in nets:
        net.double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        assert_same(net, torch.randint(V, (B, time)), torch.randint(V, (B, time)), tolerance=1e-9)
