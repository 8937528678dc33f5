"""Callbacks that do something to a training, such as a real SIGTERM, at an exact moment, or look at it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import checkpoint as dcp

from lm.checkpoints import sharded
from lm.data import TextData
from lm.training import checkpoint_io


class StopAt(Callback):
    """Sends it at the start of a step, so that training stops at its end; at step 0, just before the first.

    Args:
        step: The step after which training stops.
        rank: The rank that gets it.
        signum: Which signal.
    """

    def __init__(self, step: int, rank: int = 0, signum: int = 15) -> None:
        self.step, self.rank, self.signum = step, rank, signum

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step == 0 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)
            self.step = -1


class StopInValidation(Callback):
    """Sends it at the start of the evaluation after a step.

    Args:
        step: The step.
        rank: The rank that gets it.
    """

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


class StopAtForward(Callback):
    """Sends a signal at a forward pass of the network: of a step, an evaluation or a sample.

    Args:
        number: Which, counted from 1; 0 for none.
        signum: Which signal.
        rank: The rank that gets it.
    """

    def __init__(self, number: int = 0, signum: int = 15, rank: int = 0) -> None:
        self.number, self.signum, self.rank, self.passes = number, signum, rank, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def count(net: Any, inputs: Any) -> None:
            self.passes += 1
            if self.passes == self.number and trainer.global_rank == self.rank:
                os.kill(os.getpid(), self.signum)

        pl_module.net.register_forward_pre_hook(count)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Path("passes").write_text(str(self.passes))


class StopTwice(Callback):
    """Sends two signals inside a step.

    Args:
        step: The step.
        first: The one signal.
        second: The other.
    """

    def __init__(self, step: int, first: int = 15, second: int = 15) -> None:
        self.step, self.signals = step, (first, second)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step + 1 == self.step:
            for signum in self.signals:
                os.kill(os.getpid(), signum)


class StopWhileSaving(Callback):
    """Sends SIGINT in a step, and another one while the checkpoint that follows is being written, which takes long.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step:
            write = checkpoint_io.write

            def slow(*arguments: Any) -> None:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
                write(*arguments)
                checkpoint_io.write = write

            checkpoint_io.write = slow
            os.kill(os.getpid(), signal.SIGINT)


class PoisonAt(Callback):
    """Puts a NaN into the loss of a step.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.net.register_forward_hook(
            lambda net, inputs, logits: logits * float("nan") if trainer.global_step + 1 == self.step else None
        )


class SameStatistics(Callback):
    """Writes, once, whether the ranks' running means are the same before and in the first evaluation."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = pl_module.net.hidden[1].running_mean
        all_of_them = [torch.zeros_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(all_of_them, mine)
        self.found.append("same" if torch.equal(*all_of_them) else "differ")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.found:
            self.look(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self.found) == 1:
            self.look(trainer, pl_module)
            Path(f"statistics-{trainer.global_rank}").write_text(", then ".join(self.found))


class Poison(Callback):
    """Spoils the weights of one rank during one step, so that its loss and gradient are not finite, or large.

    Args:
        steps: The steps, counted from 1.
        factor: On the weights.
        rank: The rank; 0 by default.
    """

    def __init__(self, steps: list[int], factor: float, rank: int = 0) -> None:
        self.steps, self.factor, self.rank = steps, factor, rank
        self.kept: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank and self.kept is None:
            weight = pl_module.net.wte.weight.data
            self.kept = weight.clone()
            weight *= self.factor

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.kept is not None and trainer.global_step in self.steps:
            pl_module.net.wte.weight.data.copy_(self.kept)
            self.kept = None


class Drift(Callback):
    """Changes one bit of rank 1's weights after a step.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            bits = pl_module.net.h[0].ln_1.weight.data.view(torch.int32)
            bits[3] ^= 1


class Hang(Callback):
    """Lets rank 1 wait for ever at the start of a step, its threads alive.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == 1:
            time.sleep(1000)


class HangInForward(Callback):
    """Lets rank 1 wait for ever in the forward pass of a step.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def wait(net: Any, inputs: Any) -> None:
            if trainer.global_step + 1 == self.step and trainer.global_rank == 1 and net.training:
                time.sleep(1000)

        pl_module.net.register_forward_pre_hook(wait)


class SlowData(TextData):
    """A corpus whose preparation takes a while, and says when it has begun."""

    def prepare_data(self) -> None:
        Path("preparing").write_text("")
        time.sleep(3)
        super().prepare_data()


class SlowCopies(Callback):
    """Lets the copying of sharded checkpoints take a second, as on a slow disk."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        copy = sharded.copy

        def slow(source: Path, target: Path) -> None:
            time.sleep(1)
            copy(source, target)

        sharded.copy = slow


class WriteLater(Callback):
    """Lets the first sharded checkpoint, of step 5, be written from step 7 on, and writes down at which step it was."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save, first = dcp.save, Path(f"later-{trainer.global_rank}")

        def later(*args: Any, **keywords: Any) -> Any:
            until = time.monotonic() + 20
            while not first.exists() and trainer.global_step < 7 and time.monotonic() < until:
                time.sleep(0.01)
            if not first.exists():
                first.write_text(str(trainer.global_step))
            return save(*args, **keywords)

        dcp.save = later


class SayCores(Callback):
    """Writes down the cores that the rank's threads may use."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cores = {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
        Path(f"cores-{trainer.global_rank}.json").write_text(json.dumps([sorted(one) for one in cores]))


class WaitForNothing(Callback):
    """Makes it an error to wait for the GPU from the third step on, until the last one begins."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        number = trainer.global_step + 1
        torch.cuda.set_sync_debug_mode("error" if 3 <= number < trainer.max_steps else "default")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")
