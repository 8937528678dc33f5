"""All that this program uses of Lightning's private interface is in this file.

The position in training is part of it. Lightning 2.6 saves its loops' counters and, on resume, guesses from them
whether a validation was under way or is still due; after a stop inside one it repeats, skips or halves it (Lightning
issues 20277, 19549, 19367). Here the number of finished optimizer steps is all the state: the batches are a pure
function of it, and so is what is due.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as SubprocessLauncher
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from torch.nn.parallel import DistributedDataParallel

__all__ = ["SubprocessLauncher"]


class WholeFit(_FitLoop):
    """Lightning's fit loop, but it also runs when no step is left, as an evaluation or a checkpoint may be due."""

    @property
    def skip(self) -> bool:
        """Never."""
        return False


def begin_and_end_always(trainer: Trainer) -> None:
    """Run the start and the end of training, with their callbacks, even when no step is left."""
    loop = trainer.fit_loop
    trainer.fit_loop = WholeFit(trainer, min_epochs=loop.min_epochs, max_epochs=loop.max_epochs)
    trainer.fit_loop.epoch_loop = loop.epoch_loop


def steps_per_call(trainer: Trainer) -> int:
    """Return how many optimizer steps the module takes in one step of the Trainer."""
    return getattr(trainer.lightning_module, "steps_per_call", 1)


def count_step(trainer: Trainer) -> None:
    """Count an optimizer step that the module took by itself, without Lightning's wrapper."""
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1


def take_back_step(trainer: Trainer) -> None:
    """Count an optimizer step less: one that was counted, and turns out not to have been taken."""
    loop = trainer.fit_loop.epoch_loop
    by_lightning = trainer.lightning_module.automatic_optimization
    counter = loop.automatic_optimization.optim_progress.optimizer.step if by_lightning else None
    (counter or loop.manual_optimization.optim_step_progress).total.completed -= 1


def step_finished(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether micro-batch batch_idx was the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def restore(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Set the trainer's counters to the checkpoint's step, and keep Lightning from restoring its own."""
    step = checkpoint["global_step"]
    del checkpoint["loops"]
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.manual_optimization.optim_step_progress.total.completed = step
    for name in ("ready", "started", "processed", "completed"):
        batches = step * trainer.accumulate_grad_batches // steps_per_call(trainer)
        setattr(loop.batch_progress.total, name, batches)


def validate(trainer: Trainer) -> None:
    """Evaluate the validation split now, inside fit, as Lightning does when it is due."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer.lightning_module.train()


def validation_due(trainer: Trainer) -> bool:
    """Return whether an evaluation follows the step just finished: at its interval, or after the last step."""
    interval = trainer.val_check_batch
    if not validates(trainer):
        return False
    if nothing_left(trainer):
        return True
    if not isinstance(interval, int):
        return False
    batches, rest = divmod(trainer.global_step * trainer.accumulate_grad_batches, steps_per_call(trainer))
    return not rest and batches % interval == 0


def nothing_left(trainer: Trainer) -> bool:
    """Return whether all steps have been taken."""
    return 0 < trainer.max_steps <= trainer.global_step


def validates(trainer: Trainer) -> bool:
    """Return whether there is anything to evaluate."""
    return bool(trainer.limit_val_batches)


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop over batches, but metrics are logged under the number of the optimizer step.

    Lightning counts batches, each of which may be many steps, from 0, and from 0 again after a resume.
    """

    @property
    def _batches_that_stepped(self) -> int:
        """The step in progress, counted from 1, or else the last one; in a call that takes several, its last."""
        batches = self.batch_progress.total.ready
        steps = -(-batches // self.trainer.accumulate_grad_batches) * steps_per_call(self.trainer)
        return min(steps, self.max_steps) if self.max_steps > 0 else steps

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, value: int) -> None:
        """Do nothing: the value follows from the number of batches."""


class StepConnector(_LoggerConnector):
    """Lets callbacks log at the steps that this program logs."""

    @property
    def should_update_logs(self) -> bool:
        """Whether the step in progress, or one of the call's steps, is logged."""
        trainer = self.trainer
        if trainer._active_loop is not trainer.fit_loop:
            return super().should_update_logs
        last = step_under_way(trainer)
        before = last - steps_per_call(trainer)
        every = trainer.log_every_n_steps or trainer.max_steps  # type: ignore[attr-defined]
        first_or_last = before < 1 or before < trainer.max_steps <= last
        return first_or_last or last // every > before // every or trainer.should_stop

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log under the number of the step, without Lightning's count of epochs."""
        if step is None and "step" not in metrics:
            step = step_under_way(self.trainer)
        super().log_metrics(metrics, step)


def number_by_steps(trainer: Trainer) -> None:
    """Make Lightning's loop and loggers log under the numbers of optimizer steps."""
    trainer.fit_loop.epoch_loop.__class__ = StepLoop
    trainer._logger_connector.__class__ = StepConnector


def step_under_way(trainer: Trainer) -> int:
    """Return the number of the step in progress, or else of the last, as Lightning's loggers get it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def take_no_signals(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: inside its handlers it communicates with ranks, saves, and exits 0."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def launch_by(trainer: Trainer, launcher: SubprocessLauncher) -> None:
    """Let another launcher start this machine's ranks."""
    trainer.strategy._launcher = launcher


def check_environment(trainer: Trainer) -> None:
    """Check a cluster's variables against the Trainer's settings; Lightning does so only where it starts processes."""
    environment = trainer._accelerator_connector.cluster_environment
    environment.validate_settings(trainer.num_devices, trainer.num_nodes)


def backend(strategy: Strategy) -> str:
    """Return the backend of a strategy's process group: nccl, gloo."""
    processes: Any = strategy
    name: str = processes._get_process_group_backend()
    return name


def add_ddp_settings(strategy: DDPStrategy, **settings: Any) -> None:
    """Give DistributedDataParallel settings that the recipe does not set."""
    for name, value in settings.items():
        strategy._ddp_kwargs.setdefault(name, value)


def leave_to_each_rank(module: torch.nn.Module, names: list[str]) -> None:
    """Make DDP ignore parameters and buffers; torch documents no other way."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that Lightning has wrapped, or itself."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def duration(timer: Timer) -> float | None:
    """Return the seconds after which a Timer ends a run."""
    return timer._duration


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context in which new tensors have a dtype."""
    return _DtypeContextManager(dtype)
