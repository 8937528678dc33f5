"""Stopwatch: times the steps of a run by part, a few at a time, and lets the run wait in between."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm.training import compute, lightning_internals
from lm.training.manual import ManualLanguageModel

Wait = Callable[[Any], Any]
MARKS = {"begin": "logging", "note": "forward", "settle": "backward", "finish": "update"}
"""Methods of Step, and the part of a step that ends where each begins."""


class Stopwatch(Callback):
    """Times training steps, as they are: what stands between two marks belongs to the part that the later one names.

    data: from the end of a step to the next one's batch, with the Trainer's loop. forward, backward: of all
    micro-batches; by hand they are one, forward_backward. update: reduction, guard, clipping, optimizer. logging: the
    step's metrics, and all callbacks.

    On a GPU, which computes behind Python's back, a turn by parts waits for it at each mark, and takes longer.

    Args:
        wait: Called with a report of the turn that ended; returns the next: {"steps": how many, "by_part": whether}.
    """

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.parts: dict[str, float] = defaultdict(float)
        self._waits_for_device = False
        self._last = self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put marks into the step, and wait for the first turn."""
        module: Any = pl_module
        self.module, self.step = module, module.step
        by_hand = isinstance(module, ManualLanguageModel)
        self._names = dict.fromkeys(("forward", "backward"), "forward_backward") if by_hand else {}
        for method, part in MARKS.items():
            setattr(self.step, method, self._after(part, getattr(self.step, method)))
        self._begin(trainer, {"precision": str(trainer.precision)})

    def _after(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that begins after the mark that ends a part."""

        @wraps(method)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._mark(part)
            return method(*args, **kwargs)

        return marked

    def _mark(self, part: str) -> None:
        if self._waits_for_device:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.parts[self._names.get(part, part)] += now - self._last
        self._last = now

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Mark that the batch is there."""
        self._mark("data")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of a step or of a micro-batch; report, and wait, where the turn is over."""
        finished = lightning_internals.step_finished(trainer, batch_idx)
        self._mark("logging" if finished else "backward")
        if finished and trainer.global_step >= self._until:
            self._begin(trainer, self._report(trainer))

    def _report(self, trainer: Trainer) -> dict[str, Any]:
        device = self._device(trainer)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        steps = trainer.global_step - self._first
        seconds = time.perf_counter() - self._began
        log = self.module.step_log
        return {
            "steps": steps,
            "step_ms": 1000 * seconds / steps,
            "parts_ms": {part: 1000 * time / steps for part, time in self.parts.items()},
            "tokens": (log.tokens(trainer.global_step) - log.tokens(self._first)) // steps,
            "peak_memory_mb": round(compute.peak_memory(device) / 2**20, 1),
        }

    def _begin(self, trainer: Trainer, report: dict[str, Any]) -> None:
        order = self.wait(report)
        self._first = trainer.global_step
        self._until = self._first + order["steps"]
        self._waits_for_device = order["by_part"] and self._device(trainer).type != "cpu"
        self.parts.clear()
        self._began = self._last = time.perf_counter()

    def _device(self, trainer: Trainer) -> torch.device:
        return trainer.strategy.root_device
