"""What a training will need: computation, memory, communication, hours; nothing is allocated, nothing is sent.

A step is run on fake tensors, which have shapes and no values, so that what is counted is what torch would do.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lm.backprop.rules import precise
from lm.training.compute import blocks, recompute_blocks
from lm.training.optimizers import parameter_groups
from lm.training.sharded import shard


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


@dataclass(frozen=True)
class Recipe:
    """What of a recipe counts.

    Args:
        make_net: Returns the network.
        make_optimizer: Returns the optimizer of parameter groups.
        tokens: Shape of a micro-batch's tokens (B, T).
        targets: Shape of its targets, (B, T) or (B,).
        precision: Of the Trainer.
        accumulate: Micro-batches of a step.
    """

    make_net: Callable[[], nn.Module]
    make_optimizer: Callable[[Any], Optimizer]
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    precision: str = "32-true"
    accumulate: int = 1

    @property
    def context(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        kind = kinds.get(self.precision)
        return torch.autocast("cpu", kind) if kind else nullcontext()

    def build(self) -> nn.Module:
        """Return the network in the precision of its weights."""
        with _DtypeContextManager(DTYPES.get(self.precision, torch.float32)):
            return self.make_net()

    def forward_backward(self, net: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        """Do what a micro-batch does."""
        with self.context:
            logits = net(tokens)
            loss = F.cross_entropy(precise(logits).flatten(0, -2), targets.flatten())
        loss.backward()


def parameters(recipe: Recipe) -> int:
    """Return the number of parameters, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in recipe.make_net().parameters())


def flops_per_token(recipe: Recipe) -> float:
    """Return the multiplications and additions of a training step for a token: forward and backward pass."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net = recipe.make_net()
        tokens = torch.zeros(1, *recipe.tokens[1:], dtype=torch.long)
        targets = torch.zeros(1, *recipe.targets[1:], dtype=torch.long)
        F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten()).backward()
    return counter.get_total_flops() / tokens.numel()


def memory(recipe: Recipe, *, recompute: bool = False) -> Memory:
    """Return the memory of a step of one process, the second one, when the optimizer has its state."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = recipe.build()
        if recompute:
            recompute_blocks(net)
        optimizer = recipe.make_optimizer(parameter_groups(net))
        tokens, targets = (torch.zeros(shape, dtype=torch.long) for shape in (recipe.tokens, recipe.targets))
        tracker = MemTracker()
        tracker.track_external(net, optimizer)
        with tracker:
            for _ in range(2):
                for _ in range(min(2, recipe.accumulate)):  # the gradients of the first are there during the second
                    tracker.reset_mod_stats()
                    recipe.forward_backward(net, tokens, targets)
                optimizer.step()
                optimizer.zero_grad()
        (found,) = tracker.get_tracker_snapshot("peak").values()
        sizes = {str(getattr(kind, "name", kind)).rpartition(".")[2]: float(size) for kind, size in found.items()}
    total, weights, state = sizes["Total"], sizes["PARAM"] + sizes["BUFFER"], sizes["OPT"]
    gradients = sizes["GRAD"]
    return Memory(weights, gradients, state, total - weights - state - gradients)


def copied(alone: Memory, processes: int) -> Memory:
    """Return a process's memory under DDP: as alone, but gradients lie in buckets, which are there all the time."""
    gradients = alone.weights if processes > 1 else alone.gradients
    return Memory(alone.weights, gradients, alone.optimizer, alone.activations)


def sharded(recipe: Recipe, alone: Memory, processes: int) -> Memory:
    """Return a process's memory under FSDP2.

    It has its share of weights, gradients and optimizer state; and, gathered, the parameters that are in no block, a
    block's and the next one's, with the gradient of a block before it is reduced.
    """
    share = largest_share(recipe, processes)
    with torch.device("meta"):
        net = recipe.build()
    size = sum(p.numel() for p in net.parameters())
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks(net)), default=0)
    rest = size - sum(p.numel() for block in blocks(net) for p in block.parameters())
    part, gathered = share / size, (rest + 3 * largest) / size * alone.weights
    return Memory(alone.weights * part, alone.weights * part, alone.optimizer * part, alone.activations + gathered)


def largest_share(recipe: Recipe, processes: int) -> int:
    """Return the most parameters that a rank keeps: the sharding itself, dry-run by torch's fake process group."""
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
    """Return the bytes that a device sends in a step, by strategy; rings send (n - 1) / n of what they carry.

    DDP reduces the gradient (there and back); FSDP2 gathers the weights twice and reduces the gradient once.
    """
    part = (processes - 1) / processes * weights
    return {"ddp": 2 * part, "fsdp2": 3 * part}
