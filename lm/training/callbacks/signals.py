"""Stopping a run by a signal, or because nobody reads its output any more: at a step boundary, on all ranks."""

import signal
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm.errors import STOPS, Stopped, take_stops
from lm.training import lightning_internals

REASONS = (*STOPS, signal.SIGPIPE)


class StopSignals(Callback):
    """After a stop signal, stops at the next step boundary, and `Checkpoints` saves.

    A second signal stops at once, and a third ends the process. SIGHUP never counts as a second: a terminal that is
    closed may send it twice, or just after SIGTERM. A signal may reach one rank alone, so the ranks agree on it at
    every step, when they reduce its loss, and after every batch of an evaluation.

    Lightning's own handler saves nothing, or saves inside the handler in the middle of a step, and exits 0 (Lightning
    issues 21406, 20542, 19916). The command line disables it.

    Args:
        unread: Returns whether the reader of standard output has gone; the run then stops as on SIGPIPE.
    """

    def __init__(self, unread: Callable[[], bool] = lambda: False) -> None:
        self.unread = unread
        self.signum = 0
        self.before: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the signal handlers; a signal before the first step stops the run after it."""
        self.before = take_stops(self._receive)
        module: Any = pl_module
        if stage == "fit":
            module.step.questions |= {signum: partial(self._has_received, signum) for signum in REASONS}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            self.signum = self.signum or signum
        elif self.signum in (0, signal.SIGHUP):
            self.signum = signum
        else:
            self._give_back()
            raise Stopped(signum)

    @property
    def received(self) -> int:
        """The signal received, or 0."""
        return self.signum or (signal.SIGPIPE if self.unread() else 0)

    def _has_received(self, signum: int) -> bool:
        return self.received == signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the end of a step, if a signal was received."""
        if lightning_internals.step_finished(trainer, batch_idx):
            module: Any = pl_module
            received = self.received
            if trainer.world_size > 1:
                received = max((signum for signum in REASONS if module.step.answers.get(signum)), default=0)
            if received:
                module.step.decide()  # it may end the run a step earlier
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
        """Restore the signal handlers from before."""
        self._give_back()

    def _give_back(self) -> None:
        while self.before:
            signal.signal(*self.before.popitem())
