"""Compares training's loss and its gradients by hand with autograd's.

What is checked is `StepByHand`: the rules, gradient accumulation, the reduction over ranks, and the compiled graph
where training has one. The expected values are computed here, independently of all that.

Shapes: B sequences, T tokens.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lm.backprop import Gradients
from lm.backprop.compare import (
    DIFFERENCES,
    EXACT,
    LOSS,
    Row,
    along,
    by_autograd,
    in_float64,
    nats,
    rows,
    tolerances,
    undisturbed,
    wider,
)
from lm.data.module import IGNORED
from lm.training.by_hand import Compiled, StepByHand
from lm.training.distributed.reduction import ReducedGradients
from lm.training.division import Division

Batch = tuple[Tensor, Tensor]
Loss = Tensor | float
PATIENCE = timedelta(minutes=30)  # how long a rank waits for the other, which computes after it


class Reference:
    """The expected loss and gradient of a step: the mean cross-entropy over all its predictions, by autograd.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.predictions = 0
        self.mean: dict[str, Tensor] = {}
        self.wide: dict[str, Tensor] = {}  # the same in higher precision, which shows autograd's own error

    def see(self, tokens: Tensor, targets: Tensor) -> None:
        """Add a micro-batch's gradient before the step trains on it: same weights, same random numbers."""
        count = int((targets != IGNORED).sum())
        self.predictions += count
        part = count / max(1, self.predictions)
        for mean, find in ((self.mean, by_autograd), (self.wide, wider)):
            for name, gradient in (find(self.net, tokens, targets) or {}).items():
                mean[name] = torch.lerp(mean[name], gradient, part) if name in mean else gradient

    def compare(
        self, loss: Loss, net: nn.Module | None = None, total: Callable[[Tensor], Tensor] | None = None
    ) -> list[Row]:
        """Compare with a step's loss and the `.grad` of a network's parameters.

        Args:
            loss: Mean over all predictions of the step.
            net: The same network or a copy.
            total: Returns a tensor's sum over the ranks, where each rank saw its own micro-batches.
        """
        mean, wide = self.mean, self.wide
        if total is not None:
            own = torch.tensor(float(self.predictions), device=next(self.net.parameters()).device)
            part = self.predictions / max(1.0, float(total(own.clone())))
            mean, wide = ({name: total(g * part) for name, g in one.items()} for one in (mean, wide))
        found = {LOSS: mean[LOSS].new_tensor(float(loss))} | gradients(net or self.net)
        return rows(mean, found, tolerances(mean, wide))


def rules_in_float64(net: nn.Module, tokens: Tensor, targets: Tensor) -> list[Row]:
    """Compare the rules with autograd on some tokens in float64, where a wrong formula cannot pass for rounding.

    Returns:
        The comparison; empty where the network is in float64 already, or its device has no float64.
    """
    parameter = next(net.parameters())
    if parameter.dtype == torch.float64 or parameter.device.type == "mps":
        return []
    with torch.autocast(parameter.device.type, enabled=False):
        return _alone(in_float64(net), [cut(tokens, targets, 1024)], None)


def cut(tokens: Tensor, targets: Tensor, count: int) -> Batch:
    """Return about `count` tokens of a batch: its first sequences, at least two, with long ones cut short."""
    if targets.ndim == 2:
        tokens, targets = tokens[:, :count], targets[:, :count]
    rows = max(2, count // tokens.shape[1])
    return tokens[:rows], targets[:rows].clone(memory_format=torch.contiguous_format)


def fitted(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each parameter that requires one; zeros where the loss does not depend on it."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters() if p.requires_grad
    }


def check(net: nn.Module, batches: list[Batch], compiled: Compiled | None = None) -> dict[str, list[Row]]:
    """Compare a network's gradients by hand with autograd's, in each way that training computes them.

    Below float64, the rules are checked in float64 too, which shows what rounding hides. The network, its random state
    and its running statistics stay as they are.

    Args:
        net: Compared in its mode, train or eval; its dtype and autocast decide the arithmetic.
        batches: Four micro-batches of a shape: tokens int64 (B, T) and targets int64, (B, T) or (B,).
        compiled: Computes a micro-batch's gradients, where training compiles.

    Returns:
        The comparison for each way of computing the gradients; the first is the simplest.
    """
    net, tables = copy.deepcopy(net), {}
    rounded = torch.is_autocast_enabled("cpu") or next(net.parameters()).dtype != torch.float64
    note = ""
    if rounded:
        tables["one batch"] = _usual([_alone(net, [batch], compiled) for batch in batches])
        net, compiled, note = net.double(), None, ", in float64"
    with torch.autocast("cpu", enabled=False):
        grads = Gradients()  # shared: the first step must leave nothing that leaks into the second
        tables[f"one batch{note}"] = _alone(net, batches[:1], compiled, grads)
        tables[f"{len(batches)} micro-batches{note}"] = _alone(net, batches, compiled, grads)
        if distributed.is_gloo_available():
            tables[f"2 ranks{note}"] = _on_two_ranks(net, batches)
    return tables


def against_differences(net: nn.Module, batches: list[Batch], compiled: Compiled | None = None) -> list[Row]:
    """Compare a step's loss, and its slope along a random direction of each parameter, with central differences.

    Args:
        net: In float64, as lower precision shows nothing. Only its gradients change.
        batches: Micro-batches of a shape, as `check` takes them.
        compiled: Computes a micro-batch's gradients, where training compiles.
    """
    predictions = sum(int((targets != IGNORED).sum()) for _, targets in batches)

    def loss() -> Tensor:
        with undisturbed(net), torch.enable_grad():  # without grad, attention kernels draw other dropout masks
            sums = [nats(net, tokens, targets).detach() for tokens, targets in batches]
        return torch.stack(sums).sum() / predictions

    step = StepByHand(net, fitted(net), Gradients(), division=Division(1, len(batches)), compiled=compiled)
    with undisturbed(net):
        by_hand = _end(step, _add(step, batches), batches)
    found = gradients(net)
    wanted = loss()
    with torch.random.fork_rng():  # the losses that follow must draw the dropout masks that the gradients saw
        directions = {name: torch.randn_like(gradient) for name, gradient in found.items()}
    slopes = {name: (found[name] * direction).sum() for name, direction in directions.items()}
    slopes[LOSS] = wanted.new_tensor(float(by_hand))
    return rows(
        {LOSS: wanted} | along(net, loss, directions), slopes, dict.fromkeys(found, DIFFERENCES) | {LOSS: EXACT}
    )


def _alone(
    net: nn.Module, batches: list[Batch], compiled: Compiled | None, grads: Gradients | None = None
) -> list[Row]:
    """Check a step of one process."""
    step = StepByHand(net, fitted(net), grads or Gradients(), division=Division(1, len(batches)), compiled=compiled)
    reference = Reference(net)
    with undisturbed(net):
        loss = _end(step, _add(step, batches, reference), batches)
    return reference.compare(loss)


def _usual(tables: list[list[Row]]) -> list[Row]:
    """Return, row by row, the first comparison that agrees with the majority: a wrong rule is wrong on every batch.

    A right rule can fail on one batch, where rounding moves a ReLU's input across zero.
    """
    chosen = []
    for found in zip(*tables, strict=True):
        wrong = [row for row in found if not row.approximate]
        right = [row for row in found if row.approximate]
        chosen.append(wrong[0] if len(wrong) > len(right) else right[0])
    return chosen


def _add(step: StepByHand, batches: list[Batch], reference: Reference | None = None) -> list[Tensor]:
    step.begin()
    losses = []
    for i, batch in enumerate(batches):
        if reference is not None:
            reference.see(*batch)
        losses.append(step.add(*batch, last=i + 1 == len(batches)))
    return losses


def _end(step: StepByHand, losses: list[Tensor], batches: list[Batch], group: Any = None) -> Loss:
    step.finish()
    if step.division.parts == 1:
        return losses[0]
    loss, factor, _ = step.division.share(losses, [targets for _, targets in batches], group=group)
    torch._foreach_mul_([p.grad for p in step.parameters if p.grad is not None], factor)
    return loss


def _on_two_ranks(net: nn.Module, batches: list[Batch]) -> list[Row]:
    """Check a step of two ranks, after another step; both run in this process and communicate by gloo, as usual."""
    reference = Reference(net)
    nets, shares = [net, copy.deepcopy(net)], [batches[:2], batches[2:]]
    with _two_ranks() as (groups, pool):
        steps = [
            StepByHand(one, fitted(one), ReducedGradients(one, 2, group), division=Division(2, 2))
            for one, group in zip(nets, groups, strict=True)
        ]
        for seen in (None, reference):
            with undisturbed(net):
                losses = [_add(step, share, seen) for step, share in zip(steps, shares, strict=True)]
            means = list(pool.map(_end, steps, losses, shares, groups))  # each waits for the other
    first, second = (reference.compare(loss, one) for loss, one in zip(means, nets, strict=True))
    return [b if a.approximate and not b.approximate else a for a, b in zip(first, second, strict=True)]


@contextmanager
def _two_ranks() -> Iterator[tuple[list[Any], ThreadPoolExecutor]]:
    store = distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        yield list(pool.map(lambda rank: distributed.ProcessGroupGloo(store, rank, 2, PATIENCE), range(2))), pool
