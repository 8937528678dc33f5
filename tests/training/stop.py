"""Callbacks that send this process a real SIGTERM at an exact moment."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Sends it at the start of a step, so that training stops at its end.

    Args:
        step: The step after which training stops.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            self.step = -1


class StopInValidation(Callback):
    """Sends it at the start of the evaluation after a step.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class StopTwice(Callback):
    """Sends two of them inside a step.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)


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
