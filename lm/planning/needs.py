"""What a training run will need: computation, memory, communication, hours; nothing is allocated, nothing is sent.

A step is run on fake tensors, which have shapes and no values, so that the counts are of what torch would do.

Shapes: B sequences, T tokens.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from lm.errors import UserError
from lm.training import lightning_internals
from lm.training.compute import blocks, recompute_blocks
from lm.training.distributed.sharding import shard
from lm.training.division import Division
from lm.training.objectives import CrossEntropy
from lm.training.optimizers import parameter_groups


@dataclass(frozen=True)
class Device:
    """A kind of GPU, from its maker's data sheet.

    Args:
        memory: GB, 10⁹ bytes.
        flops: Dense bfloat16 multiplications and additions per second, 10¹²; float16 where it has no bfloat16.
    """

    memory: float
    flops: float


DEVICES = {
    "T4": Device(16, 65),
    "V100": Device(32, 125),
    "A10G": Device(24, 70),
    "L4": Device(24, 121),
    "L40S": Device(48, 362),
    "RTX3090": Device(24, 71),
    "RTX4090": Device(24, 165),
    "A100-40GB": Device(40, 312),
    "A100": Device(80, 312),
    "H100": Device(80, 989),
    "H200": Device(141, 989),
    "B200": Device(180, 2250),
}
FEW = 6  # layers up to which a network is counted as it is; a deeper one is extrapolated from two and three
RESERVED = 1.5  # GB of a GPU that CUDA, NCCL and the allocator's gaps take
DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """All else: what the backward pass needs, and what operations need while they run."""

    @property
    def peak(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def after(self, two: "Memory", layers: int) -> "Memory":
        """Return the memory of `layers` layers, extrapolated from that of two and from this, of three."""
        pairs = ((getattr(two, key), getattr(self, key)) for key in self.__dataclass_fields__)
        return Memory(*(a + (layers - 2) * (b - a) for a, b in pairs))


@dataclass(frozen=True)
class Recipe:
    """The parts of a recipe that decide what it needs.

    Args:
        make_net: Returns the network; where `layers` is set, it takes n_layer.
        make_optimizer: Returns the optimizer of parameter groups.
        tokens: Shape of a micro-batch's tokens (B, T).
        targets: Shape of its targets, (B, T) or (B,).
        precision: Of the Trainer.
        accumulate: Micro-batches of a step.
        layers: The recipe's n_layer, where make_net takes another one.
    """

    make_net: Callable[..., nn.Module]
    make_optimizer: Callable[[Any], Optimizer]
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    precision: str = "32-true"
    accumulate: int = 1
    layers: int | None = None

    @property
    def deep(self) -> bool:
        """Whether the needs of two and three layers tell those of all: there are many more, and they are alike."""
        if self.layers is None or self.layers <= FEW:
            return False
        with torch.device("meta"):
            lists = [part for part in self.make_net(n_layer=3).children() if isinstance(part, nn.ModuleList)]
        return bool(lists) and all(len(part) == 3 and len({str(block) for block in part}) == 1 for part in lists)

    def with_layers(self, n_layer: int) -> "Recipe":
        """Return the recipe with so many layers."""
        return replace(self, make_net=partial(self.make_net, n_layer=n_layer), layers=n_layer)

    @property
    def context(self) -> AbstractContextManager[Any]:
        """The context of the forward pass: autocast, if the precision is mixed."""
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        kind = kinds.get(self.precision)
        return torch.autocast("cpu", kind) if kind else nullcontext()

    def build(self) -> nn.Module:
        """Return the network in the precision of its weights."""
        with lightning_internals.default_dtype(DTYPES.get(self.precision, torch.float32)):
            return self.make_net()

    def forward_backward(
        self,
        net: nn.Module,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the forward and the backward pass of a micro-batch, and call `between` between them."""
        with self.context:
            loss = CrossEntropy()(net(tokens), targets, Division())
        between()
        loss.backward()


P = ParamSpec("P")
Moments = tuple[Memory, Memory, Memory]
R = TypeVar("R", int, float, Moments)


def extrapolated(count: Callable[Concatenate[Recipe, P], R]) -> Callable[Concatenate[Recipe, P], R]:
    """Decorate a function that counts something of a network: a deep one is extrapolated from two and three layers."""

    @wraps(count)
    def counted(recipe: Recipe, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not recipe.deep:
            return count(recipe, *args, **kwargs)
        assert recipe.layers is not None
        two, three = count(recipe.with_layers(2), *args, **kwargs), count(recipe.with_layers(3), *args, **kwargs)
        if isinstance(two, tuple):
            return tuple(b.after(a, recipe.layers) for a, b in zip(two, three, strict=True))  # type: ignore[return-value]
        return two + (recipe.layers - 2) * (three - two)

    return counted


@extrapolated
def parameters(recipe: Recipe) -> int:
    """Return the number of parameters, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in recipe.make_net().parameters())


@extrapolated
def flops_per_token(recipe: Recipe, *, backward: bool = True) -> float:
    """Return the multiplications and additions for a token: of the forward pass, and if wanted the backward pass."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net = recipe.make_net()
        tokens = torch.zeros(2, *recipe.tokens[1:], dtype=torch.long)  # BatchNorm has no variance over one
        targets = torch.zeros(2, *recipe.targets[1:], dtype=torch.long)
        loss = CrossEntropy()(net(tokens), targets, Division())
        if backward:
            loss.backward()
    flops: int = counter.get_total_flops()
    return flops / tokens.numel()


class Tracker(MemTracker):
    """torch's MemTracker without the peak of each module, which it would update at every operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


def memory(recipe: Recipe, *, recompute: bool = False) -> Memory:
    """Return the memory of one process in its second step, when the optimizer has its state."""
    return _worst(moments(recipe, recompute=recompute))


@extrapolated
def moments(recipe: Recipe, *, recompute: bool = False) -> Moments:
    """Return the memory of a step when its backward pass begins, when it ends, and at the worst moment.

    For a deeper network, or a sharded one, another moment may be the worst: many activations, or all gradients.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: list[Memory] = []

    def look(when: str) -> None:
        (found,) = tracker.get_tracker_snapshot(when).values()
        sizes = {str(getattr(kind, "name", kind)).rpartition(".")[2]: float(size) for kind, size in found.items()}
        weights, gradients, state = sizes["PARAM"] + sizes["BUFFER"], sizes["GRAD"], sizes["OPT"]
        seen.append(Memory(weights, gradients, state, sizes["Total"] - weights - gradients - state))

    with FakeTensorMode():
        net = recipe.build()
        if recompute:
            recompute_blocks(net)
        optimizer = recipe.make_optimizer(parameter_groups(net))
        tokens, targets = (torch.zeros(shape, dtype=torch.long) for shape in (recipe.tokens, recipe.targets))
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # the first step: after it, the optimizer has its state
        if recipe.accumulate == 1:  # else the gradients of earlier micro-batches are there
            optimizer.zero_grad()
        tracker = Tracker()
        tracker.track_external(net, optimizer)
        with tracker:
            recipe.forward_backward(net, tokens, targets, between=lambda: look("current"))
            look("current")
            optimizer.step()
        look("peak")
    begin, end, worst = seen
    return begin, end, worst


def copied(alone: Memory, processes: int) -> Memory:
    """Return a process's memory under DDP: as alone, but gradients are in buckets, which are never freed."""
    gradients = alone.weights if processes > 1 else alone.gradients
    return Memory(alone.weights, gradients, alone.optimizer, alone.activations)


def shares(recipe: Recipe, processes: int) -> tuple[float, float]:
    """Return the fraction of the parameters that a rank keeps under FSDP2, and that it has gathered, see `at_once`.

    Raises:
        UserError: The network has BatchNorm, which is not sharded.
    """
    size = parameters(recipe)
    return largest_share(recipe, processes) / size, at_once(recipe) / size


def sharded(alone: Memory, part: float, gathered: float) -> Memory:
    """Return a process's memory under FSDP2 with these `shares`: its fraction of everything, plus what is gathered."""
    own = alone.weights * part
    return Memory(own, own, alone.optimizer * part, alone.activations + alone.weights * gathered)


def at_once(recipe: Recipe) -> int:
    """Return how many parameters a rank holds whole under FSDP2: those in no block, two blocks, and one's gradient."""
    with torch.device("meta"):
        net = (recipe.with_layers(3) if recipe.deep else recipe).build()
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(net)]
    return sum(p.numel() for p in net.parameters()) - sum(sizes) + 3 * max(sizes, default=0)


def _worst(moments: Iterable[Memory]) -> Memory:
    return max(moments, key=lambda moment: moment.peak)


def strategies(recipe: Recipe, processes: int) -> dict[str, Memory]:
    """Return a process's memory for each strategy that the network allows."""
    table = {}
    try:
        parts = shares(recipe, processes)
    except UserError:  # it has BatchNorm
        parts = None
    for suffix, again in {"": False, " + activation_checkpointing": True}.items():
        try:
            alone = moments(recipe, recompute=again)
        except UserError:  # this network has no blocks that can be computed twice
            continue
        table["ddp" + suffix] = _worst(copied(one, processes) for one in alone)
        if parts:
            table["fsdp2" + suffix] = _worst(sharded(one, *parts) for one in alone)
    return table


@extrapolated
def largest_share(recipe: Recipe, processes: int) -> int:
    """Return the most parameters that a rank keeps, from a dry run of the sharding with torch's fake process group."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with torch.device("meta"):
            net = recipe.make_net()
        shard(net, init_device_mesh("cpu", (processes,)))  # dimension 0 in chunks rounded up: rank 0 has the most
        parameters: Any = net.parameters()
        return sum(parameter.to_local().numel() for parameter in parameters)
    finally:
        distributed.destroy_process_group()


def communication(weights: float, processes: int) -> dict[str, float]:
    """Return the bytes that a device sends in a step, by strategy; a ring sends (n - 1) / n of its data.

    DDP all-reduces the gradient (reduce-scatter and all-gather); FSDP2 all-gathers the weights twice and
    reduce-scatters the gradient.
    """
    part = (processes - 1) / processes * weights
    return {"ddp": 2 * part, "fsdp2": 3 * part}


def remedy(recipe: Recipe, room: float) -> str:
    """Return what would make a recipe fit that fits with no strategy as it is.

    Args:
        recipe: Its precision and network are kept where possible.
        room: Bytes that a device has for it.
    """
    shape = {"tokens": (1, *recipe.tokens[1:]), "targets": (1, *recipe.targets[1:])}
    for precision in dict.fromkeys((recipe.precision, "bf16-true")):
        smallest = replace(recipe, **shape, precision=precision)  # type: ignore[arg-type]
        try:
            alone = moments(smallest, recompute=True)
            largest_share(smallest, 2)
        except UserError:  # nothing to recompute, or BatchNorm, which is not sharded
            needed = f"{memory(smallest).peak / 1e9:,.3g} GB"
            return f"micro-batches of 1 sequence need {needed}: a smaller network, or a shorter block_size"
        whole = max(moment.activations for moment in alone)
        whole += at_once(smallest) / parameters(smallest) * alone[0].weights
        if whole < room:
            shared = 2 * alone[0].weights + alone[0].optimizer
            devices = 2 ** max(0, math.ceil(math.log2(shared / (room - whole))))
            return (
                f"{devices:,} devices would do, with trainer.strategy fsdp2, model.activation_checkpointing true, "
                f"trainer.precision {precision} and micro-batches of 1 sequence"
            )
    return (
        f"not on any number of these, as one layer and one sequence need {whole / 1e9:,.4g} GB at once: "
        "a device with more memory, a smaller n_embd, or a shorter block_size"
    )
