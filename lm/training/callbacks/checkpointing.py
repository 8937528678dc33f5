"""When checkpoints are written, under which names, and which are kept."""

import itertools
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lm.bounds import checked
from lm.checkpoints import checkpoint as files
from lm.checkpoints import owned, schema
from lm.checkpoints.background import BackgroundWriter
from lm.errors import UserError
from lm.training import harmless, lightning_internals
from lm.training.checkpoint_io import AtomicCheckpointIO


class Checkpoints(Checkpoint):
    """Writes last.ckpt, best.ckpt and step=NNNNNNN.ckpt into the run's folder.

    Where a step is both to be evaluated and saved, it is saved after the evaluation, so that no checkpoint lacks one.
    Lightning's ModelCheckpoint is not used: it ties last.ckpt to its best ones and may leave it stale (Lightning issues
    20245, 19189), and it does not save when a run is stopped.

    Args:
        every_n_steps: Optimizer steps between periodic checkpoints.
        keep_last: How many periodic checkpoints to keep; null keeps all.
        keep_every: Periodic checkpoints at multiples of this step are kept whatever keep_last says; null for none.
    """

    @checked("checkpoint.", UserError)
    def __init__(
        self, *, every_n_steps: int = 1000, keep_last: int | None = None, keep_every: int | None = None
    ) -> None:
        self.every_n_steps, self.keep_last, self.keep_every = every_n_steps, keep_last, keep_every
        self.folder = Path("checkpoints")  # the command line sets both
        self.start = 0
        self.best: float = math.inf
        self.validated_step = -1
        self.saved = (-1, -1)
        """The step of last.ckpt, and the step that had last been evaluated then."""
        self._origin: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation loss and the step that was last evaluated."""
        return {"best": self.best, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self.best, self.validated_step = state_dict["best"], state_dict["validated_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record which start of the run writes this checkpoint: a later start is newer, even at an earlier step."""
        checkpoint[schema.START] = self.start
        checkpoint["epoch"] = 0  # there are no epochs; Lightning counts one where a run ends, but not where it resumes

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember which checkpoint training resumes from."""
        saved = schema.Saved.of(checkpoint, schema.FITTED)
        self._origin = saved.start, saved.step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget another run's best loss, as best.ckpt is this run's own; make up for an interrupted evaluation."""
        found = self._found(trainer) if trainer.is_global_zero else (False, False)
        own, saved = trainer.strategy.broadcast(found)  # ranks that look by themselves may see different files
        if not own:
            self.best = math.inf
            if lightning_internals.nothing_left(trainer):  # a new run that starts at its last step evaluates it again
                self.validated_step = -1
        if saved:
            self.saved = trainer.global_step, self.validated_step
        self._retain_later(trainer)  # an earlier process may have been killed between saving and deleting
        if trainer.global_step and lightning_internals.validation_due(trainer):
            self._validate(trainer)

    def _found(self, trainer: Trainer) -> tuple[bool, bool]:
        """Return whether a run with a best.ckpt is resumed, and whether all checkpoints of its last step were saved."""
        if trainer.ckpt_path is None or Path(trainer.ckpt_path).resolve().parent != self.folder.resolve():
            return False, False
        last, step = files.newest_first(self.folder).get(self.last), trainer.global_step
        saved = last is not None and (last.start, last.step) == self._origin
        saved &= bool(step % self.every_n_steps) or self._periodic(step).exists()
        return (self.folder / "best.ckpt").exists(), saved

    def _validate(self, trainer: Trainer) -> None:
        if self.validated_step != trainer.global_step:
            lightning_internals.validate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a periodic checkpoint, unless an evaluation comes first; raise if an earlier one was not written."""
        if not lightning_internals.step_finished(trainer, batch_idx):
            return
        _writer(trainer).check()
        if not lightning_internals.validation_due(trainer):
            self._save(trainer, self._due(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best checkpoint where this is it, and the periodic one where it is due."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        loss = float(trainer.callback_metrics.get("val_loss", math.inf))
        best = []
        if loss < self.best:
            self.best = loss
            best = [self.folder / "best.ckpt"]
        self._save(trainer, best + self._due(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and save the last step, whatever the intervals; wait until all is written."""
        if lightning_internals.validates(trainer):
            self._validate(trainer)
        if self.saved != (trainer.global_step, self.validated_step):
            self._save(trainer, self._due(trainer) or [self.last])
        _writer(trainer).wait()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where training stopped between two steps: at a signal, or before an update that the guard refused."""
        if getattr(exception, "at_boundary", False) and self.saved[0] != trainer.global_step:
            owes = lightning_internals.validation_due(trainer) and self.validated_step != trainer.global_step
            due = [] if owes else self._due(trainer)
            self._save(trainer, due or [self.last])
        _writer(trainer).wait()

    @property
    def last(self) -> Path:
        """The newest checkpoint's path."""
        return self.folder / "last.ckpt"

    def _due(self, trainer: Trainer) -> list[Path]:
        """Return the paths of the periodic checkpoint; none where it is not due."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and self.saved != (step, self.validated_step)
        return [self._periodic(step), self.last] if due else []

    def _periodic(self, step: int) -> Path:
        return self.folder / f"step={step:07d}.ckpt"

    def _save(self, trainer: Trainer, targets: list[Path]) -> None:
        """Save the state once, and under further names by copying the file."""
        if not targets:
            return
        for logger in trainer.loggers:  # metrics up to a checkpoint reach the disk before it does
            logger.save()
        first, *others = self._free(trainer, targets)
        trainer.save_checkpoint(first)
        if trainer.is_global_zero:
            for other in others:
                _io(trainer).copy(first, other)
        self._retain_later(trainer)
        if self.last in targets:
            self.saved = trainer.global_step, self.validated_step

    def _free(self, trainer: Trainer, targets: list[Path]) -> list[Path]:
        """Return the targets that no other program's file occupies; if none is free, a name of the step's that is."""
        foreign, free = [], []
        if trainer.is_global_zero:
            foreign = [path for path in targets if owned.is_foreign(path)]
            free = [path for path in targets if path not in foreign]
            name = self._periodic(trainer.global_step)
            others = (name.with_stem(f"{name.stem}-{number}") for number in itertools.count(2))
            free = free or [next(path for path in itertools.chain([name], others) if not owned.is_foreign(path))]
        foreign, free = trainer.strategy.broadcast([foreign, free])  # each rank may see different files
        for path in foreign if trainer.is_global_zero else []:
            text = f"note: {path} is in the way and was not written by lm: it is left alone, {free[0]} is saved instead"
            harmless.note_once(self, f"{text}: move it away", kind=path)
        return free

    def _retain_later(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.keep_last is not None:
            _writer(trainer).submit(self._retain)

    def _retain(self) -> None:
        """Delete the periodic checkpoints that are not to be kept."""
        periodic = [path for path in files.newest_first(self.folder) if re.fullmatch(r"step=\d+\.ckpt", path.name)]
        for old in periodic[self.keep_last :]:
            step = int(old.stem.removeprefix("step="))
            if self.keep_every is None or step % self.keep_every:
                with suppress(UserError, OSError):  # lm did not write it, or the disk refuses: it stays
                    owned.remove(old)


def _io(trainer: Trainer) -> AtomicCheckpointIO:
    return cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io)


def _writer(trainer: Trainer) -> BackgroundWriter:
    return _io(trainer).writer
