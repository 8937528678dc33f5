"""Where training stands, and evaluation on demand: the only place that touches the Trainer's loops.

Lightning 2.6 saves its loops' counters and, on resume, guesses from them whether a validation was under way or is
still due; after a stop inside one it repeats, skips or halves it (Lightning issues 20277, 19549, 19367). Here one
number, the count of finished optimizer steps, says it all: batches are a pure function of it, and so is what is due.
"""

import time
from contextlib import suppress
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = 5.0  # seconds of a rank that has failed for the others to fail, too


class WholeFit(_FitLoop):
    """Lightning's loop, except that it runs where no step is left, too: an evaluation or a checkpoint may be due."""

    @property
    def skip(self) -> bool:
        """Never."""
        return False


def begin_and_end_always(trainer: Trainer) -> None:
    """Let training begin and end, with all that callbacks do then, even where no step is left."""
    loop = trainer.fit_loop
    trainer.fit_loop = WholeFit(trainer, min_epochs=loop.min_epochs, max_epochs=loop.max_epochs)
    trainer.fit_loop.epoch_loop = loop.epoch_loop


def trains_in_memory(trainer: Trainer) -> bool:
    """Return whether this machine's own memory must hold all that training needs: on a CPU, and not sharded."""
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return trainer.state.fn == "fit" and trainer.strategy.root_device.type == "cpu" and not sharded


def all_have_failed(trainer: Trainer) -> bool:
    """Return whether all ranks have failed at this step, as all call the same callbacks; waits some seconds for them.

    Ranks that go on know nothing of it, so no collective operation can tell: the store does where they have met.
    """
    if trainer.world_size == 1:
        return True
    key = f"lm/failed/{trainer.global_step}"
    with suppress(Exception):  # the first rank, who has the store, is gone
        store = _get_default_store()
        failed = store.add(key, 1)
        end = time.monotonic() + PATIENCE
        while failed < trainer.world_size and time.monotonic() < end:
            time.sleep(0.05)
            failed = store.add(key, 0)
        return failed == trainer.world_size or store.add(key, -1) + 1 == trainer.world_size  # who comes now is too late
    return False


def steps_per_call(trainer: Trainer) -> int:
    """Return how many optimizer steps the module takes in one of the Trainer's."""
    return getattr(trainer.lightning_module, "steps_per_call", 1)


def count_step(trainer: Trainer) -> None:
    """Count an optimizer step that the module took by itself, without Lightning's wrapper."""
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1


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
    """Return whether an evaluation follows the step that has just been finished: at its interval, or after the last."""
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
