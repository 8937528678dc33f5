"""Gradients by hand beside others: autograd's, or central differences of the loss."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models.parts import precise

IGNORED = -100  # F.cross_entropy's own, and lm.data's
EXACT = 1e-10
"""The tolerance in float64, where a wrong formula has nowhere to hide: rounding is 1e-16, some hundred times."""
SPARE = 12.0
"""How many times autograd's own error the two may differ, where a wider arithmetic can tell that error."""
UNITS = 4  # in the last place: the least error that a sum of many numbers has
FLOOR = 0.01
LOSS = "loss"
"""The row of the loss itself, which can be wrong where its gradient is right."""
DIFFERENCES = 1e-5
"""The tolerance of central differences in float64: rounding 1e-16 / step, and the third derivative times step²."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: Of a parameter or an intermediate; or loss.
        shape: Its shape.
        exact: Whether both are equal to the last bit.
        approximate: Whether the relative difference is within the tolerance.
        maxdiff: The largest absolute difference.
        relative: That, divided by the largest element of the row's gradient, or a hundredth of the largest of all
            gradients if that is more: where the true one is zero, as of a bias before BatchNorm, there is only
            rounding. Of the loss, divided by the loss.
    """

    name: str
    shape: list[int]
    exact: bool
    approximate: bool
    maxdiff: float
    relative: float


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Put the random state and the network's buffers, such as running statistics, back; hooks see nothing of it."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    hooks = {module: dict(module._forward_hooks) for module in net.modules()}
    for module in hooks:
        module._forward_hooks.clear()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, seen in hooks.items():
            module._forward_hooks.update(seen)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])


def nats(net: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy, summed over all that is predicted."""
    logits = precise(net(tokens)).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def by_autograd(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the mean cross-entropy, and its gradient by each parameter; zeros where that plays no part.

    The random state, running statistics and `.grad` stay as they are.
    """
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with undisturbed(net), torch.enable_grad():
        loss = nats(net, tokens, targets) / (targets != IGNORED).sum().clamp(min=1)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {LOSS: loss.detach()} | {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def in_float64(net: nn.Module) -> nn.Module:
    """Return a copy of a network in float64, which no hook looks at."""
    with undisturbed(net):
        return copy.deepcopy(net).double()


def wider(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor] | None:
    """Return the same in an arithmetic with more digits, at the same weights; None where there is none.

    That is float32 for products in bfloat16 under autocast, and float64 for float32.
    """
    device = tokens.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return by_autograd(net, tokens, targets)
    if next(net.parameters()).dtype == torch.float64 or device == "mps":  # which has no float64
        return None
    return by_autograd(in_float64(net), tokens, targets)


def along(net: nn.Module, loss: Callable[[], Tensor], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the slope of a loss along a direction of each parameter, by central differences.

    (L(w + h u) - L(w - h u)) / 2h is the derivative but for h² L''' / 6.
    """
    step, slopes = 1e-6, {}
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


def rows(expected: dict[str, Tensor], found: dict[str, Tensor], tolerances: dict[str, float]) -> list[Row]:
    """Compare gradients of the same names, and the loss, by each one's tolerance of the relative difference."""
    largest = max((float(value.abs().max()) for name, value in expected.items() if name != LOSS), default=0.0)
    table = []
    for name, wanted in expected.items():
        difference = float((wanted - found[name]).abs().max())
        scale = max(float(wanted.abs().max()), 0.0 if name == LOSS else FLOOR * largest)
        relative = difference / scale if scale else difference
        exact = torch.equal(wanted, found[name])
        table.append(Row(name, list(wanted.shape), exact, relative <= tolerances[name], difference, relative))
    return table


def tolerances(rounded: dict[str, Tensor], wide: dict[str, Tensor]) -> dict[str, float]:
    """Return by how much each gradient may differ from autograd's.

    Autograd's own error is known where the same gradient was found with more digits. Ours rounds in other places, so
    it may be off by a few times that, or by a few times what is typical of the network where autograd was lucky.

    Args:
        rounded: Autograd's gradients.
        wide: The same with more digits; empty where there are none: of float64.
    """
    if not wide:
        return dict.fromkeys(rounded, EXACT)
    errors = {row.name: row.relative for row in rows(wide, rounded, dict.fromkeys(wide, 0.0))}
    typical = max(median(errors.values()), UNITS * torch.finfo(next(iter(rounded.values())).dtype).eps)
    return {name: SPARE * max(error, typical) for name, error in errors.items()}


def stir(net: nn.Module) -> None:
    """Move every gain, bias and zero away from its first value, behind which errors hide."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
