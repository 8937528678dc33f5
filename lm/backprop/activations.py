"""Rules of activations: functions of each element alone, so that dx = dy ∘ f'(x). Any shape.

Some functions return f(x) and f'(x) together, for backward passes that make both again from x rather than keep f(x).
"""

import math

import torch
from torch import Tensor, nn

from lm.backprop.rules import Backward, Gradients, rule, run
from lm.models.feed_forward import GELU, ReLUSquared
from lm.models.parts import gelu_tanh, gelu_tanh_value, precise


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


@rule(nn.ReLU, ReLUSquared, nn.GELU, GELU)
def from_input(layer: nn.Module, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = f(x), of which x is kept: see `value_and_slope`."""
    y = gelu_tanh_value(x) if isinstance(layer, nn.GELU) and layer.approximate == "tanh" else layer(x)
    return y, lambda dy: dy * value_and_slope(layer, grads, x)[1]


def value_and_slope(layer: nn.Module, grads: Gradients, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an activation's f(x) and f'(x), in at least 32 bits.

    max(0, x) has slope 1 where x is positive and else 0, its square has slope 2 max(0, x). An activation that is not
    known here has a rule, of which f'(x) is the gradient for dy = 1.
    """
    x = precise(x)
    match layer:
        case nn.GELU():
            return gelu_tanh(x) if layer.approximate == "tanh" else _gelu(x)
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


def silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """f = x σ(x): f' = σ + x σ (1 - σ) = σ (1 + x (1 - σ))."""
    s = torch.sigmoid(x)
    value = x * s
    return value, s + value * (1 - s)
