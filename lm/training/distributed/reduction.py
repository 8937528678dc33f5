"""Gradients by hand of several processes, reduced while the backward pass goes on.

DDP's own reduction hangs on autograd's hooks, so it never sees gradients that were not made by autograd (Lightning
issue 9237: no error, and weights that drift apart).
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lm.backprop import Gradients
from lm.backprop.rules import Backward, Collected, Rule, once

BUCKET = 25 << 20  # bytes, as DDP's


class ReducedGradients(Gradients):
    """Gathers gradients in flat buckets, and averages a bucket over the ranks as soon as it is whole.

    Parameters are put into buckets from the last to the first, about the order in which the backward pass reaches
    them. A parameter is whole when each layer that has it has added its part, so a tied one waits for both.

    Args:
        net: The network.
        world_size: Number of ranks.
        group: In which they reduce; all of this process's by default.
    """

    def __init__(self, net: nn.Module, world_size: int, group: Any = None) -> None:
        super().__init__()
        self.world_size, self.group = world_size, group
        uses = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
        parameters = [p for p in reversed(list(net.parameters())) if p.requires_grad]
        self.buckets: list[Tensor] = []
        self.parts: dict[int, tuple[int, Tensor]] = {}  # of a parameter: its bucket, and its view of that
        self.expected: list[Counter[int]] = []  # of a bucket: how often each of its parameters is added to
        bucket: list[nn.Parameter] = []
        for i, parameter in enumerate(parameters):
            bucket.append(parameter)
            full = sum(p.numel() * p.element_size() for p in bucket) >= BUCKET
            following = parameters[i + 1] if i + 1 < len(parameters) else None
            if full or following is None or following.dtype != parameter.dtype:
                self._make_bucket(bucket, uses)
                bucket = []
        self.missing: list[Counter[int]] = []
        self.empty: set[int] = set()  # the parameters of which nothing has been added in this step
        self.open = self.reducing = False  # whether a step has begun; whether its last pass has
        self.work: dict[int, distributed.Work | None] = {}

    def _make_bucket(self, group: list[nn.Parameter], uses: Counter[int]) -> None:
        flat = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device)
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            self.parts[id(parameter)] = len(self.buckets), part.view_as(parameter)
        self.buckets.append(flat)
        self.expected.append(Counter({id(p): uses[id(p)] for p in group}))

    def begin(self, parameters: list[nn.Parameter]) -> None:
        """Begin a step: each parameter's gradient is a view of its bucket, to be written by what is added first."""
        self.open, self.reducing = True, False
        self.work.clear()
        self.empty = set(self.parts)
        for parameter in parameters:
            parameter.grad = self.parts[id(parameter)][1]

    def last_pass(self) -> None:
        """Say that the pass that follows is the step's last: what is whole after it is reduced."""
        self.missing = [Counter(expected) for expected in self.expected]
        self.reducing = True

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add the gradient's share of the ranks' mean, and reduce the bucket if that made it whole."""
        if not parameter.requires_grad:
            return
        part = self.parts[id(parameter)][1]
        if id(parameter) in self.empty:
            torch.mul(gradient, 1 / self.world_size, out=part)
        else:
            part.add_(gradient, alpha=1 / self.world_size)
        self._added(parameter)

    def add_rows(self, table: Tensor, index: Tensor, rows: Tensor) -> None:
        """Add to rows, and reduce the bucket if that made it whole."""
        if not table.requires_grad:
            return
        part = self.parts[id(table)][1]
        if id(table) in self.empty:
            part.zero_()
        part.scatter_add_(0, index.unsqueeze(1).expand_as(rows), rows.to(table.dtype) / self.world_size)
        self._added(table)

    def _added(self, parameter: Tensor) -> None:
        if not self.open:
            raise RuntimeError("a gradient came before its step began or after it ended: no rank would see it")
        self.empty.discard(id(parameter))
        if not self.reducing:
            return
        number = self.parts[id(parameter)][0]
        missing = self.missing[number]
        if number in self.work:
            raise RuntimeError("a rule adds to a parameter more often than layers have it: add its parts up first")
        missing[id(parameter)] -= 1
        if not missing[id(parameter)]:
            del missing[id(parameter)]
        if not missing:
            self._reduce(number)

    def _reduce(self, number: int) -> None:
        self.work[number] = distributed.all_reduce(self.buckets[number], group=self.group, async_op=True)

    def finish(self) -> None:
        """Reduce what is left, parameters that played no part, and wait."""
        for parameter in self.empty:
            self.parts[parameter][1].zero_()
        for number in range(len(self.buckets)):
            if number not in self.work:
                self._reduce(number)
        for work in self.work.values():
            if work is not None:
                work.wait()
        self.open = self.reducing = False


class Shards(NamedTuple):
    """A reduction under way: of a layer's gradients, this rank's shards side by side."""

    parameters: list[DTensor]
    flat: Tensor
    work: Any

    def settle(self) -> None:
        """Wait for it, and add each shard to its parameter's gradient."""
        self.work.wait()
        parts = self.flat.split([_rows(p) * (p.numel() // len(p)) for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            here = parameter.to_local()
            shard = part[: here.numel()].view_as(here)
            if parameter.grad is None:
                parameter.grad = DTensor.from_local(
                    shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )
            else:
                parameter.grad.to_local().add_(shard)  # type: ignore[attr-defined]


class ShardedGradients(Collected):
    """Gradients of a network that FSDP2 has sharded: whole while a layer is at work, then each rank's shard.

    A block's parameters are gathered for its forward and for its backward pass; then the mean of its gradients over the
    ranks is taken, of which each keeps its shard. What belongs to no block is whole from `begin` to `finish`.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.units = {module for module in net.modules() if isinstance(module, FSDPModule) and module is not net}
        self.pending: dict[nn.Module, Shards] = {}

    def hooks(self, layer: nn.Module) -> Iterable[Any]:
        """Return none for a layer that is sharded itself: those are FSDP2's own."""
        return () if isinstance(layer, FSDPModule) else super().hooks(layer)

    def begin(self, parameters: list[nn.Parameter]) -> None:
        """Begin a step."""
        super().begin(parameters)
        self.net.unshard()  # type: ignore[operator]

    def call(self, rule: Rule, layer: Any, *inputs: Any) -> tuple[Any, Backward]:
        """Return what a layer's rule does, with whole parameters."""
        if layer not in self.units:
            return super().call(rule, layer, *inputs)
        layer.unshard()
        output, backward_whole = super().call(rule, layer, *inputs)
        layer.reshard()

        def backward(*dy: Any) -> Any:
            layer.unshard()
            dx = backward_whole(*dy)
            self._reduce(layer)
            return dx

        return output, once(backward)

    def finish(self) -> None:
        """Reduce what belongs to no block, and wait for all."""
        self._reduce(self.net)
        for shards in self.pending.values():
            shards.settle()
        self.pending.clear()

    def _reduce(self, unit: Any) -> None:
        """Begin to reduce the gradients of a unit, and leave each rank its shards of the parameters."""
        whole = self._parameters(unit)
        unit.reshard()
        sharded: list[Any] = self._parameters(unit)
        if not sharded:
            return
        ranks = sharded[0].device_mesh.size()
        pieces = []
        for parameter, full in zip(sharded, whole, strict=True):
            gradient = self.found.pop(full, None)
            gradient = torch.zeros_like(full) if gradient is None else gradient
            rows = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
            rows = F.pad(rows, (0, 0, 0, ranks * _rows(parameter) - len(rows)))  # those of the last ranks may be fewer
            pieces.append(rows.view(ranks, -1))
        flat = torch.cat(pieces, dim=1).div_(ranks)  # (ranks, all shards)
        if unit in self.pending:  # of the micro-batch before
            self.pending.pop(unit).settle()
        mine = torch.empty_like(flat[0])
        group = sharded[0].device_mesh.get_group()
        # renamed in torch 2.13
        scatter = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
        work = scatter(mine, flat.flatten(), group=group, async_op=True)
        self.pending[unit] = Shards(sharded, mine, work)

    def _parameters(self, unit: nn.Module) -> list[nn.Parameter]:
        """Return a unit's fitted parameters as they are now, whole or shards, without those of units within it."""
        inner = {p for module in self.units - {unit} for p in module.parameters()} if unit is self.net else set()
        return [p for p in unit.parameters() if p.requires_grad and p not in inner]


def _rows(parameter: DTensor) -> int:
    """Return the rows of a parameter's shard; the last ranks may have fewer."""
    return -(-len(parameter) // parameter.device_mesh.size())


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks."""
    for tensor in tensors:
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()
