"""Stopping a run by a signal: at a step boundary, on all ranks."""

import signal
from functools import partial
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm.errors import Stopped
from lm.training import progress

STOPS = (signal.SIGTERM, signal.SIGINT)


class StopSignals(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C, stops at the next step boundary, and `Checkpoints` saves. A second stops at once.

    SIGUSR1 is what SLURM sends ahead of a job's end (`--signal=USR1@120`); the run stops as by SIGTERM. A signal may
    reach one rank alone: the ranks agree at every step, when they share its loss, and inside an evaluation after every
    batch.

    Lightning's own handler saves nothing, or saves inside the handler in the middle of a step, and exits 0 (Lightning
    issues 21406, 20542, 19916). The command line keeps it out.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signals over; one that comes before the first step stops after it."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.before[signum] = signal.signal(signum, self._receive)
        module: Any = pl_module
        if stage == "fit":
            module.questions |= {signum: partial(self._has_received, signum) for signum in STOPS}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise Stopped(signum)
        self.received = signal.SIGTERM if signum == signal.SIGUSR1 else signum

    def _has_received(self, signum: int) -> bool:
        return self.received == signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where a step has been finished."""
        if progress.step_finished(trainer, batch_idx):
            module: Any = pl_module
            told = [signum for signum in STOPS if module.answers.get(signum)]
            if received := self.received if trainer.world_size == 1 else max(told, default=0):
                raise Stopped(received, at_boundary=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop inside an evaluation; the resumed run makes up for it."""
        if trainer.state.fn != "fit":
            return
        received = self.received
        if trainer.world_size > 1:
            codes = torch.tensor(received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(codes, op=torch.distributed.ReduceOp.MAX)
            received = int(codes)
        if received:
            raise Stopped(received, at_boundary=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        while self.before:
            signal.signal(*self.before.popitem())
