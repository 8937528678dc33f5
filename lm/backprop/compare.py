"""Gradients by hand beside others: autograd's, or central differences of the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.backprop.networks import loss_and_gradients
from lm.backprop.rules import Gradients

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest relative disagreement that is rounding.

Both sides round each number to half a unit in the last place (1e-16, 6e-8, 4e-3) and sum in another order. Through a
deep network such errors grow to some hundred units, and to a few dozen where products alone are in bfloat16. A wrong
formula is off by about 1.
"""
FLOOR = 0.01
DIFFERENCES = 1e-5
"""The tolerance of central differences in float64: rounding 1e-16 / step, and the third derivative times step²."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: Of a parameter or an intermediate.
        shape: Its shape.
        exact: Whether both are equal to the last bit.
        approximate: Whether the relative difference is within the tolerance.
        maxdiff: The largest absolute difference.
        relative: That, divided by the largest element of the row's gradient, or a hundredth of the largest of all rows
            if that is more: where the true gradient is zero, as of a bias before BatchNorm, there is only rounding.
    """

    name: str
    shape: list[int]
    exact: bool
    approximate: bool
    maxdiff: float
    relative: float


class Collected(Gradients):
    """Keeps gradients aside, and leaves the parameters' `.grad` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Tensor, Tensor] = {}

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to what was collected."""
        if parameter.requires_grad:
            old = self.found.get(parameter)
            self.found[parameter] = gradient.to(parameter.dtype) if old is None else old + gradient

    def add_rows(self, table: Tensor, index: Tensor, rows: Tensor) -> None:
        """Add to rows of what was collected."""
        place = index.unsqueeze(1).expand_as(rows)
        self.add(table, torch.zeros_like(table).scatter_add_(0, place, rows.to(table.dtype)))


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Put the random state and the network's buffers, such as running statistics, back afterwards."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])


def by_autograd(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean cross-entropy by each parameter; zeros where it plays no part."""
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with undisturbed(net), torch.enable_grad():
        logits = net(tokens)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def by_hand(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the same, by the rules."""
    grads = Collected()
    with undisturbed(net), torch.no_grad():
        loss_and_gradients(net, grads, tokens, targets)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return {name: grads.found.get(p, torch.zeros_like(p)) for name, p in parameters.items()}


def along(net: nn.Module, tokens: Tensor, targets: Tensor, directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the loss's slope along a direction of each parameter, by central differences.

    (L(w + h u) - L(w - h u)) / 2h is the derivative but for h² L''' / 6.
    """
    step = 1e-6

    def loss() -> Tensor:
        with undisturbed(net), torch.enable_grad():  # without, dropout would draw other masks
            return F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten()).detach()

    slopes = {}
    with torch.no_grad():
        for name, direction in directions.items():
            parameter = net.get_parameter(name)
            before = parameter.clone()
            parameter.copy_(before + step * direction)
            up = loss()
            parameter.copy_(before - step * direction)
            down = loss()
            parameter.copy_(before)
            slopes[name] = (up - down) / (2 * step)
    return slopes


def rows(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> list[Row]:
    """Compare gradients of the same names."""
    largest = max((float(value.abs().max()) for value in expected.values()), default=0.0)
    table = []
    for name, wanted in expected.items():
        difference = float((wanted - found[name]).abs().max())
        scale = max(float(wanted.abs().max()), FLOOR * largest)
        relative = difference / scale if scale else difference
        exact = torch.equal(wanted, found[name])
        table.append(Row(name, list(wanted.shape), exact, relative <= tolerance, difference, relative))
    return table


def against_autograd(net: nn.Module, tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> list[Row]:
    """Compare a network's gradients by hand with autograd's, of the mean cross-entropy of a batch.

    The random state, running statistics and `.grad` stay as they are; both sides draw the same dropout masks.

    Args:
        net: Its mode, train or eval, is what is compared.
        tokens: int64 (B, T).
        targets: int64, (B, T) or (B,).
        dtype: Of the arithmetic, which says the tolerance.
    """
    expected, found = by_autograd(net, tokens, targets), by_hand(net, tokens, targets)
    return rows(expected, found, TOLERANCES[dtype])


def against_differences(net: nn.Module, tokens: Tensor, targets: Tensor) -> list[Row]:
    """Compare slopes along a random direction of each parameter with central differences; for float64."""
    found = by_hand(net, tokens, targets)
    with torch.random.fork_rng():  # the losses that follow must draw the dropout masks that the gradients saw
        directions = {name: torch.randn_like(gradient) for name, gradient in found.items()}
    slopes = {name: (found[name] * direction).sum() for name, direction in directions.items()}
    return rows(along(net, tokens, targets, directions), slopes, DIFFERENCES)


def stir(net: nn.Module, size: float = 0.1) -> None:
    """Move every gain, bias and zero away from its first value, behind which errors hide."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(size * torch.randn_like(parameter))
