"""How a network computes, as opposed to what: compilation, activation checkpointing, memory, DDP's settings."""

import math
import resource
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint

from lm.errors import UserError
from lm.models.layers import BatchNorm
from lm.training import lightning_internals


def blocks(net: nn.Module) -> list[nn.Module]:
    """Return a network's blocks, which run one after another: the members of its ModuleLists."""
    return [block for part in net.children() if isinstance(part, nn.ModuleList) for block in part]


def recompute_blocks(net: nn.Module) -> None:
    """Let each block keep only its input for the backward pass, and recompute the rest there.

    Memory for activations falls to about one block's, for a third more computation (Chen et al., "Training Deep Nets
    with Sublinear Memory Cost", 2016). Dropout draws the same numbers again. The keys of the state_dict do not change.

    Raises:
        UserError: The network has no blocks, or BatchNorm, whose running statistics would be updated twice.
    """
    if not blocks(net) or any(isinstance(module, BatchNorm) for module in net.modules()):
        raise UserError(
            f"model.activation_checkpointing: {type(net).__name__} has no blocks that can be computed twice: set it "
            "to false"
        )
    for block in blocks(net):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compiler_missing(device: torch.device) -> str | None:
    """Return what torch.compile lacks for a device, or None where nothing is missing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton"
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception:  # its own kind of error has changed between releases
        return f"a C++ compiler ({', '.join(str(name) for name in config.cpp.cxx if name)})"
    return None if shutil.which(compiler) else f"the C++ compiler {compiler}"


def memory(root: Path = Path("/")) -> tuple[float, float]:
    """Return this machine's or container's total and free memory in bytes; infinity where they are unknown."""
    try:
        rows = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        total, free = (float(int(rows[key].split()[0]) << 10) for key in ("MemTotal", "MemAvailable"))
    except OSError:
        return math.inf, math.inf
    cgroup = root / "sys/fs/cgroup"
    for limit, used in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes"),
    ):
        if limit.exists() and (value := limit.read_text().strip()).isdigit():
            total, free = min(total, int(value)), min(free, int(value) - _used(used))
    return total, free


def _used(path: Path) -> int:
    """Return a container's used memory in bytes, without the page cache that the kernel can reclaim."""
    with suppress(OSError, ValueError):
        rows = dict(line.split() for line in path.with_name("memory.stat").read_text().splitlines())
        return max(0, int(path.read_text()) - int(rows.get("total_inactive_file", rows.get("inactive_file", 0))))
    return 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had at once: of a GPU's memory, or else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # in KB but for macOS


def leave_constants(module: nn.Module) -> None:
    """Make DDP ignore non-persistent buffers, the same on each rank: it would broadcast them at every step."""
    kept = module.state_dict()
    constants = [name for name, _ in module.named_buffers() if name not in kept]
    lightning_internals.leave_to_each_rank(module, constants)


def tune(strategy: DDPStrategy) -> None:
    """Let DDP reduce gradients in place, without a copy of all of them; the recipe's own settings win.

    On CPUs, gradients of less than 25 MB are reduced at once, after the backward pass: communication that overlaps it
    would take its cores. Elsewhere, DDP's first bucket is one mebibyte.
    """
    lightning_internals.add_ddp_settings(strategy, gradient_as_bucket_view=True)
    if strategy.root_device.type == "cpu":
        lightning_internals.add_ddp_settings(strategy, bucket_cap_mb=25)


def trains_in_memory(trainer: Trainer) -> bool:
    """Return whether this machine's own memory must hold all that training needs: on a CPU, and not sharded."""
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return trainer.state.fn == "fit" and trainer.strategy.root_device.type == "cpu" and not sharded
