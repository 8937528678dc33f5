"""Elementwise formulas, worked on in parts that a processor's cache holds, and autograd through them.

On CPUs torch takes several passes through memory for RMSNorm and rotary positions, and a slow tanh for GELU, most of
all in 16 bits. What is here is for training on CPUs in float32 and bfloat16, uncompiled; elsewhere, and in float64, by
which gradients are checked, networks use torch's own.

Shapes: N rows (all leading dimensions together), C channels, T time, D channels of a head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

PART = 1 << 18  # elements: a MiB in float32
GELU_TANH = 2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi)


def in_parts_pay(x: Tensor) -> bool:
    """Return whether x is an input of training that the functions here are for; `lm plan`'s has another type."""
    low = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
    return low and type(x) is Tensor and x.requires_grad and not torch.compiler.is_compiling()


def precise(x: Tensor) -> Tensor:
    """Return x in at least 32 bits: elementwise formulas and sums lose digits in fewer."""
    return x.float() if x.dtype.itemsize < 4 else x


def in_parts(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function on some rows (N, …) of all tensors at a time, as many as a processor's cache can hold.

    Many operations one after another on a large tensor take half of the time so, as none reads it from memory again.

    Args:
        function: Writes its results into some of the tensors.
        tensors: Of the same N; those that are written to are contiguous, as their rows would else be copies.
    """
    size = max(1, PART * len(tensors[0]) // max(1, tensors[0].numel()))
    if len(tensors[0]) <= size or torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        function(*tensors)
        return
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        function(*parts)


def rows_of(x: Tensor) -> Tensor:
    """Return x (…, C) as rows (N, C)."""
    return x.flatten(0, -2)


# -- GELU by tanh


def gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return f = x σ(v) and f', with v = 2 √(2/π) (x + 0.044715 x³), as ½ (1 + tanh u) = σ(2u).

    With a = 2 √(2/π) and b = 0.044715 a, v = x (a + b x²) and v' = a + 3 b x². As σ' = σ (1 - σ),
        f' = σ + x σ (1 - σ) v' = σ + f v' (1 - σ) = t + σ (1 - t), t = f v',
    which is what lerp computes, from t to 1 by σ.
    """
    a, b = GELU_TANH
    square = x * x
    s = _sigmoid_of_v(x, square)
    value = x * s
    slope_of_v = square.mul_(3 * b).add_(a)
    return value, slope_of_v.mul_(value).lerp_(x.new_ones(()), s)


def gelu_tanh_value(x: Tensor) -> Tensor:
    """Return f of any tensor (…, C) alone."""
    y = x.new_empty(x.shape)

    def part(x: Tensor, y: Tensor) -> None:
        x = precise(x)
        torch.mul(_sigmoid_of_v(x, x * x), x, out=y)

    in_parts(part, rows_of(x), rows_of(y))
    return y


def _sigmoid_of_v(x: Tensor, square: Tensor) -> Tensor:
    a, b = GELU_TANH
    constant = torch.full((), a, device=x.device, dtype=x.dtype)  # made there: a copy would be waited for
    return torch.add(constant, square, alpha=b).mul_(x).sigmoid_()


class GELUTanh(Function):
    """GELU by tanh, of which the slope is kept, made while x is at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return f(x)."""
        y, slope = x.new_empty(x.shape), x.new_empty(x.shape)

        def part(x: Tensor, y: Tensor, slope: Tensor) -> None:
            for place, found in zip((y, slope), gelu_tanh(precise(x)), strict=True):
                place.copy_(found)

        in_parts(part, *map(rows_of, (x, y, slope)))
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Return dx = dy f'(x)."""
        (slope,) = ctx.saved_tensors
        return dy * slope


# -- RMSNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float, normal_type: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = γ x̂ of x's type, x̂ = x r of another, and r = (Σ x² / C + ε)^-½, (…, 1) in at least 32 bits."""
    y, normal = x.new_empty(x.shape), x.new_empty(x.shape, dtype=normal_type)
    r = precise(x[:0]).new_empty(*x.shape[:-1], 1)

    def part(x: Tensor, r: Tensor, normal: Tensor, y: Tensor) -> None:
        x = precise(x)
        r.copy_(torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1))
        x = x * r
        normal.copy_(x)
        y.copy_(x.mul_(weight))

    in_parts(part, *map(rows_of, (x, r, normal, y)))
    return y, normal, r


def rms_norm_backward(dy: Tensor, normal: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx (…, C) of r's type and dγ (C,); lm.backprop.norms derives them."""
    dx = r.new_empty(normal.shape)
    gamma, total = weight.to(r.dtype) / normal.shape[-1], r.new_zeros(normal.shape[-1])

    def part(dy: Tensor, normal: Tensor, r: Tensor, dx: Tensor) -> None:
        dy, normal = precise(dy), precise(normal)
        product = dy * normal  # (n, C)
        total.add_(product.sum(0))
        torch.mul(dy, weight, out=dx)
        dx.addcmul_(normal, (product @ gamma).unsqueeze(-1), value=-1).mul_(r)

    with full_precision(dx):
        in_parts(part, *map(rows_of, (dy, normal, r, dx)))
    return dx, total


def full_precision(x: Tensor) -> Any:
    """Return a context in which autocast casts no product."""
    return torch.autocast(x.device.type, enabled=False)


class RMS(Function):
    """RMSNorm, of which x̂ and r are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return y of x's type."""
        y, normal, r = rms_norm(x, weight, eps, x.dtype)
        ctx.save_for_backward(normal, r, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return dx and dγ."""
        normal, r, weight = ctx.saved_tensors
        dx, total = rms_norm_backward(dy, normal, r, weight)
        return dx.to(normal.dtype), total.to(weight.dtype), None


# -- rotary positions


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return pairs of channels (i, i + D/2) of x (…, T, D) turned by angles whose cosines and sines are (T, D/2)."""
    y = x.new_empty(x.shape)

    def part(x: Tensor, y: Tensor) -> None:
        first, second = precise(x).chunk(2, dim=-1)  # (n, T, D) -> each (n, T, D/2)
        y_first, y_second = y.chunk(2, dim=-1)
        y_first.copy_((first * cos).addcmul_(second, sin, value=-1))
        y_second.copy_((second * cos).addcmul_(first, sin))

    in_parts(part, x.flatten(0, -3), y.flatten(0, -3))
    return y


class Turn(Function):
    """Rotary positions: an orthogonal map, whose transpose turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x turned."""
        ctx.angles = cos, sin
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return dy turned back."""
        cos, sin = ctx.angles
        return turned(dy, cos, -sin), None, None
