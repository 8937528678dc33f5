"""The side of a sweep that runs inside a trial: it reports each evaluation, and ends the run where it is told to."""

import json
import math
import os
import socket
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lm.training.harmless import harmless

VARIABLE = "LM_TRIAL"
"""The environment variable that tells a run that it is a trial: {"socket": N, "settings": {…}}."""


class Reports(Callback):
    """Tells the sweep of each evaluation before its checkpoint is written, so that a resumed run tells it again.

    All ranks stop, or none: the first one asks, and the others hear its answer.

    Args:
        about: What the environment variable says.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self.number, self.settings = about["socket"], about["settings"]
        self.connection: socket.socket | None = None

    @classmethod
    def wanted(cls) -> list[Callback]:
        """Return the callback where this process is a trial's; nothing elsewhere."""
        said = os.environ.get(VARIABLE)
        return [cls(json.loads(said))] if said else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect; a run that resumes asks whether it was to stop there: it may have been killed before it did.

        The other ranks have not inherited the socket.
        """
        if trainer.is_global_zero:
            self.connection = socket.socket(fileno=self.number)
        if trainer.global_step:
            self._ask(trainer, {"step": trainer.global_step, "resumed": True})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and stop the run where the answer is to."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        told = self.connection is not None
        self._ask(trainer, {"step": trainer.global_step, "values": values(trainer, pl_module) if told else {}})

    def _ask(self, trainer: Trainer, report: dict[str, Any]) -> None:
        stop = False
        if self.connection is not None:
            self.connection.sendall(json.dumps(report).encode())
            stop = bool(json.loads(self.connection.recv(1 << 16) or b"{}").get("stop"))
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True

    @harmless
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill TensorBoard's HParams tab: the trial's settings and its last figures."""
        from torch.utils.tensorboard.summary import hparams

        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for board in boards if trainer.is_global_zero else []:
            kinds = (bool, int, float, str)
            settings = {
                name: value if isinstance(value, kinds) else str(value) for name, value in self.settings.items()
            }
            metrics = {f"hparam/{name}": value for name, value in values(trainer, pl_module).items()}
            writer = cast(Any, board.experiment)
            for summary in hparams(settings, metrics):
                writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, trainer.global_step)


def values(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """Return all that is logged, as the checkpoint of this step has it: a resumed run knows no more."""
    module: Any = pl_module
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found |= {f"train/{name}": float(value) for name, value in module.metrics.items() if name != "step"}
    found |= {f"val/{k}": float(v) for k, v in module.validation.items() if k not in ("step", "tokens")}
    found["val_loss"] = module.validation["loss"]
    return {name: value for name, value in found.items() if math.isfinite(value)}
