"""Lightning's own callbacks and Trainer arguments in `lm fit`: which are refused and why, and how others are adapted.

docs/lightning.md lists all of them. Lightning counts batches and epochs, training here counts steps: one place corrects
the numbers, `lightning_internals.StepLoop`.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as parts
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lm.errors import CommandError, UserError, setting
from lm.training import lightning_internals, schedules
from lm.training.distributed import failing

NO_EPOCHS = "training has no epochs"
SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "barebones": ((False,), "it leaves out checkpoints, logs and evaluation: switch off by itself what is not wanted"),
    "check_val_every_n_epoch": ((None,), f"{NO_EPOCHS}: say the steps between evaluations, trainer.val_check_interval"),
    "enable_checkpointing": ((None, True), "a run without checkpoints is lost when it ends: to try, fast_dev_run"),
    "gradient_clip_algorithm": ((None, "norm"), "gradients are clipped by norm here"),
    "limit_predict_batches": ((None, 1.0), "nothing is predicted: lm sample prints text"),
    "min_epochs": ((None,), f"{NO_EPOCHS}: say trainer.min_steps"),
    "model_registry": ((None,), "checkpoints are written to checkpoints/RUN alone: copy them from there"),
    "overfit_batches": ((0,), f"{NO_EPOCHS} whose batches could come again: train on a short text, data.corpus"),
    "reload_dataloaders_every_n_epochs": ((0,), NO_EPOCHS),
    "use_distributed_sampler": ((False,), "the data is divided over the ranks already, each token once"),
}
"""The values that a Trainer's argument may have, and why no others."""

OWN_STEP = "what a step is would change under way, and a resumed run be another one"
OWN_WEIGHTS = "what is evaluated and saved would be other weights than those that are trained"
CALLBACKS: dict[type[Callback], str] = {
    parts.BasePredictionWriter: "nothing is predicted: lm sample prints text",
    parts.BatchSizeFinder: f"{OWN_STEP}: say data.batch_size, which lm plan can find",
    parts.GradientAccumulationScheduler: f"{OWN_STEP}: say trainer.accumulate_grad_batches",
    parts.BaseFinetuning: "each parameter belongs to the optimizer from the first step on: begin with "
    + setting("init_from"),
    parts.LearningRateFinder: f"{OWN_STEP}: try learning rates in runs of their own, model.init_args.optimizer",
    parts.ModelPruning: "a pruned network's parameters have other names, and no checkpoint of it would load",
    parts.OnExceptionCheckpoint: "each stop between two steps is saved already: continue with "
    f"{setting('ckpt_path')} last",
    parts.SpikeDetection: "it ends the run unsaved: say model.init_args.spike, which stops before the update or skips",
    parts.StochasticWeightAveraging: f"{OWN_WEIGHTS}; and the learning rate is the schedule's",
    parts.WeightAveraging: OWN_WEIGHTS,
}
"""Callbacks that are refused, with their subclasses, and why."""

EPOCHS: tuple[tuple[type[Callback], str, Any], ...] = (
    (parts.EarlyStopping, "check_on_train_epoch_end", True),
    (parts.LearningRateMonitor, "logging_interval", "epoch"),
    (parts.ModelCheckpoint, "save_on_train_epoch_end", True),
    (parts.Timer, "interval", "epoch"),
)
"""Settings with which callbacks wait for the end of an epoch: they would act when the run ends, or never."""

TRAINING = ("loss", "loss_step", "learning_rate", "gradient_norm", "tokens", "tokens_per_second")
"""What every logged step has, under train/: see `LanguageModel.metrics`."""

AnyCallback = TypeVar("AnyCallback", bound=Callback)


def refuse_settings(settings: Any) -> None:
    """Raise a UserError for a Trainer's argument that is not for training in steps.

    Args:
        settings: The Trainer's arguments, a mapping.
    """
    for name, (allowed, reason) in SETTINGS.items():
        if settings[name] not in allowed:
            raise UserError(f"trainer.{name} is {settings[name]}: {reason}")
    if settings["accumulate_grad_batches"] is None:
        raise UserError("trainer.accumulate_grad_batches is null: say how many micro-batches a step has, 1 for one")
    if isinstance(settings["val_check_interval"], float):
        raise UserError(
            f"trainer.val_check_interval is {settings['val_check_interval']}: {NO_EPOCHS} of which it could be a part: "
            "say a number of steps"
        )
    if settings["profiler"] == "xla":
        raise UserError("trainer.profiler xla is for TPUs, which lm does not use: simple, advanced or pytorch")


def refuse_callbacks(callbacks: list[Callback], run: Path) -> None:
    """Raise a UserError for a callback that would change how training goes, or could do nothing in it.

    Args:
        callbacks: The recipe's.
        run: Folder of the run's checkpoints.
    """
    for callback in callbacks:
        name = "trainer.max_time" if isinstance(callback, MaxTime) else f"trainer.callbacks: {type(callback).__name__}"
        for kind, reason in CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"{name}: {reason}")
        if type(callback) is parts.ProgressBar:
            raise UserError(f"{name} draws nothing: say TQDMProgressBar or RichProgressBar")
        for kind, attribute, value in EPOCHS:
            found = getattr(callback, f"_{attribute}", getattr(callback, attribute, None))
            if isinstance(callback, kind) and found == value:
                raise UserError(f"{name}: {attribute} is {value}: {NO_EPOCHS}: leave it out")
        seconds = lightning_internals.duration(callback) if isinstance(callback, parts.Timer) else None
        if seconds is not None and seconds <= 0:
            raise UserError(f"{name}: duration is {seconds:g} s: it must be above 0")
        folder = getattr(callback, "dirpath", None)
        if isinstance(callback, parts.ModelCheckpoint) and folder and Path(folder).resolve() == run.resolve():
            raise UserError(f"{name}: dirpath {run} is where lm keeps its own: say another folder")


def take_over(settings: dict[str, Any], run: Path) -> None:
    """Check a Trainer's callbacks, and add those that its other arguments stand for.

    Args:
        settings: The Trainer's arguments, changed in place.
        run: Folder of the run's checkpoints.
    """
    callbacks = settings["callbacks"] or []
    settings["callbacks"] = callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if settings["max_time"] is not None:
        callbacks.append(_max_time(settings["max_time"]))
        settings["max_time"] = None
    settings["min_epochs"] = 0  # with min_steps, Lightning would wait for an epoch's end, which never comes
    refuse_callbacks(callbacks, run)
    if any(isinstance(callback, parts.ProgressBar) for callback in callbacks):
        settings["enable_progress_bar"] = True


def mend(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Make Lightning's loop, progress bars and monitors count steps, and print what they are asked for.

    Args:
        trainer: The Trainer that has them.
        say: Prints a line.
    """
    for name in ("callbacks.early_stopping", "callbacks.model_summary", "profilers.profiler"):
        logger = logging.getLogger(f"lightning.pytorch.{name}")
        logger.handlers, logger.propagate = [Said(say)], False
        logger.setLevel(logging.INFO)  # Lightning's others are kept quiet
    lightning_internals.number_by_steps(trainer)
    mixins: dict[type[Callback], type[Callback]] = {
        parts.ProgressBar: StepBar,
        parts.LearningRateMonitor: AfterTheStep,
    }
    for callback in cast(list[Callback], trainer.callbacks):  # type: ignore[attr-defined]
        for kind, mixin in mixins.items():
            if isinstance(callback, kind):
                own = type(callback)
                callback.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})


class Said(logging.Handler):
    """Prints the log messages of a part of Lightning like any other line of the run.

    Args:
        say: Prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Print."""
        self.say(record.getMessage())


class StepBar(parts.ProgressBar):
    """Mixed into a progress bar: it counts steps from 0 to max_steps, also of a resumed run."""

    @property
    def total_train_batches(self) -> int | float:
        """All steps of the run."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the step that training resumes from."""
        super().on_train_epoch_start(trainer, pl_module)
        if isinstance(self, parts.TQDMProgressBar):
            self.train_progress_bar.set_description(self.train_description)
        self._show(trainer, pl_module, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move to the number of finished steps."""
        if lightning_internals.step_finished(trainer, batch_idx):
            self._show(trainer, pl_module, outputs, batch)

    def _show(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.train_description:{len(self.validation_description)}}"


class AfterTheStep(Callback):
    """Mixed into a monitor that reads the learning rate before a step, when it is not set yet: reads it afterwards."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: there is only one epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do nothing: the step's rate is not set yet."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the rate of the step that has been finished."""
        if lightning_internals.step_finished(trainer, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


class MaxTime(parts.Timer):
    """Ends a run after a time, counted anew at each start: Lightning's would end a resumed run where it starts."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def _max_time(duration: Any) -> MaxTime:
    try:
        return MaxTime(duration)
    except (MisconfigurationException, TypeError, OverflowError) as error:
        raise UserError(f"trainer.max_time is {duration}: say DD:HH:MM:SS, or a mapping as hours: 2") from error


class Endings(Callback):
    """Checks what other callbacks monitor; delays an early stop until the step is finished, and says why it came.

    Args:
        say: Prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._wanted = self._begun = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the schedule at all steps, and that what is monitored will be there."""
        module: Any = pl_module
        schedules.check(module.step.schedule, trainer.global_step, trainer.max_steps)
        known = {"val_loss", *(f"train/{name}" for name in TRAINING)}
        known |= {f"val/{name}" for name in module.logged}
        callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
        others = [one for one in callbacks if not type(one).__module__.startswith(("lightning.pytorch.", "lm."))]
        logs = any(isinstance(one, parts.LearningRateMonitor) for one in callbacks)
        for callback in callbacks:
            name = getattr(callback, "monitor", None)
            strict = getattr(callback, "strict", True)
            if isinstance(name, str) and strict and name not in known and not others and not logs:
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__}: monitor is {name}: there are "
                    f"{', '.join(sorted(known))}"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that this start has begun a step."""
        self._begun = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Delay a stop that a callback wants in the middle of a step, when half of its random numbers are drawn."""
        self._wanted |= trainer.should_stop
        trainer.should_stop = self._wanted and lightning_internals.step_finished(trainer, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let `Checkpoints` save where a callback or the data failed between two steps, so that no step is lost.

        Several ranks save together, so all must have failed at this step; a GPU that failed has nothing to save.
        """
        finished = self._begun and trainer.global_step == lightning_internals.step_under_way(trainer)
        unknown = isinstance(exception, Exception) and not isinstance(exception, CommandError | torch.AcceleratorError)
        if finished and unknown and failing.all_have_failed(trainer):
            exception.at_boundary = True  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why training ended early, and which files Lightning's own callback has written."""
        if not trainer.is_global_zero:
            return
        callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.should_stop and trainer.global_step < trainer.max_steps:
            reasons = [reason for callback in callbacks if (reason := _reason(callback))]
            why = "; ".join(reasons) or "a callback set trainer.should_stop"
            self.say(f"note: ended after step {trainer.global_step} of {trainer.max_steps}: {why}")
        for callback in callbacks:
            if isinstance(callback, parts.ModelCheckpoint) and callback.best_model_path:
                self.say(f"note: {type(callback).__name__}: {callback.best_model_path}")


def _reason(callback: Callback) -> str | None:
    """Return why a callback ended training; None where it did not."""
    name = type(callback).__name__
    if isinstance(callback, parts.EarlyStopping) and callback.stopping_reason_message:
        return f"{name}: {callback.stopping_reason_message.removesuffix(' Signaling Trainer to stop.')}"
    if isinstance(callback, parts.Timer) and (left := callback.time_remaining()) is not None and left <= 0:
        what = "trainer.max_time" if isinstance(callback, MaxTime) else f"{name}: duration"
        return f"{what} {timedelta(seconds=lightning_internals.duration(callback) or 0)} is over"
    return None


def sequences(batch: tuple[Tensor, Tensor]) -> int:
    """Return how many sequences a batch has, or several steps' batches together; for ThroughputMonitor.

    Args:
        batch: tokens (B, T) or (K, B, T), and targets.
    """
    return batch[0].shape[:-1].numel()


def tokens(batch: tuple[Tensor, Tensor]) -> int:
    """Return how many tokens a batch has, (B, T) or (K, B, T); see `sequences`."""
    return batch[0].numel()
