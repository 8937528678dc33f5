"""logs/RUN/run.json: what a report says of a run that its recipe does not: command, commit, machine, size, memory."""

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm import storage
from lm.training import compute
from lm.training.compatibility import versions
from lm.training.harmless import harmless

FILE = "run.json"


class About(Callback):
    """Writes the file when training begins, and its last figures when it ends.

    Args:
        logs: The run's logs/RUN.
    """

    def __init__(self, logs: Path) -> None:
        self.path = logs / FILE
        self.values: dict[str, Any] = {}

    @harmless
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known at the start."""
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            net: Any = pl_module.net
            self.values = {
                "command": shlex.join(["lm", *sys.argv[1:]]),
                "commit": commit(),
                "hardware": f"{trainer.world_size} x {processor(device)}",
                "versions": versions(),
                "parameters": sum(p.numel() for p in net.parameters()),
            }
            self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the step and the memory."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add them where training was stopped, too."""
        self._end(trainer)

    @harmless
    def _end(self, trainer: Trainer) -> None:
        if self.values:
            peak = compute.peak_memory(trainer.strategy.root_device) / 2**20  # of the first rank
            self.values |= {"step": trainer.global_step, "peak_memory_mb": round(peak, 1)}
            self._write()

    def _write(self) -> None:
        if os.path.lexists(self.path) and not is_ours(self.path):
            return
        with storage.whole(self.path, flushed=False) as file:  # it only explains
            file.write(json.dumps(self.values, indent=1).encode())


def is_ours(path: Path) -> bool:
    """Return whether a file is a run.json of lm's."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
        return isinstance(found, dict) and {"command", "parameters"} <= found.keys()
    return False


def commit() -> str | None:
    """Return the commit that is checked out where the run was started; None outside of a repository."""
    with suppress(OSError, subprocess.SubprocessError):
        words = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=5)
        return done.stdout.strip()[:12] or None
    return None


def processor(device: torch.device) -> str:
    """Return a device's name, as its maker has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return platform.machine()
