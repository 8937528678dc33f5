"""Rules of activations: functions of each element alone, so that dx = dy ∘ f'(x). Any shape.

Some functions return f(x) and f'(x) together, for backward passes that make both again from x rather than keep f(x).
"""

import math

import torch
from torch import Tensor, nn

from lm.backprop.rules import Backward, Gradients, in_parts, precise, rows_of, rule, run
from lm.models.feed_forward import ReLUSquared

GELU_TANH = 2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi)


@rule(nn.Tanh)
def tanh(layer: nn.Tanh, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = tanh x: y' = 1 - y², dx = dy (1 - y²)."""
    y = torch.tanh(x)
    return y, lambda dy: dy - dy * y * y


@rule(nn.Sigmoid)
def sigmoid(layer: nn.Sigmoid, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = 1 / (1 + e^-x): y' = y (1 - y), dx = dy y (1 - y)."""
    y = torch.sigmoid(x)
    return y, lambda dy: dy * y * (1 - y)


@rule(nn.ReLU, ReLUSquared, nn.GELU)
def from_input(layer: nn.Module, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = f(x), of which x is kept: see `value_and_slope`."""
    y = gelu_tanh(x) if isinstance(layer, nn.GELU) and layer.approximate == "tanh" else layer(x)
    return y, lambda dy: dy * value_and_slope(layer, grads, x)[1]


def value_and_slope(layer: nn.Module, grads: Gradients, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an activation's f(x) and f'(x), in at least 32 bits.

    max(0, x) has slope 1 where x is positive and else 0, its square has slope 2 max(0, x). An activation that is not
    known here has a rule, of which f'(x) is the gradient for dy = 1.
    """
    x = precise(x)
    match layer:
        case nn.GELU():
            return _gelu_tanh(x) if layer.approximate == "tanh" else _gelu(x)
        case nn.ReLU():
            return torch.relu(x), (x > 0).to(x.dtype)
        case ReLUSquared():
            positive = torch.relu(x)
            return positive * positive, 2 * positive
    value, backward = run(layer, grads, x)
    return value, backward(torch.ones_like(value))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x Φ(x), Φ the normal distribution's function and φ = Φ' its density: f' = Φ(x) + x φ(x)."""
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * below, below + x * density


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x σ(v) with v = 2 √(2/π) (x + 0.044715 x³), as ½ (1 + tanh u) = σ(2u).

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


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU by tanh in half of the time of torch's, which has a tanh to compute."""
    y = x.new_empty(x.shape)

    def part(x: Tensor, y: Tensor) -> None:
        x = precise(x)
        y.copy_(_sigmoid_of_v(x, x * x).mul_(x))

    in_parts(part, rows_of(x), rows_of(y))
    return y


def _sigmoid_of_v(x: Tensor, square: Tensor) -> Tensor:
    a, b = GELU_TANH
    return torch.add(x.new_tensor(a), square, alpha=b).mul_(x).sigmoid_()


def silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x σ(x): f' = σ + x σ (1 - σ) = σ (1 + x (1 - σ))."""
    s = torch.sigmoid(x)
    value = x * s
    return value, s + value * (1 - s)
