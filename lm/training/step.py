"""A training step, from top to bottom: forward, backward, reduce over ranks, guard, clip, update, log.

The methods of `Step` stand in the order in which they run. `Step.take` calls them where a module takes steps by itself;
where Lightning's loop does, its hooks call the same methods in the same order, see lm.training.language_model.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lm.errors import CheckError, UserError
from lm.training import lightning_internals
from lm.training.callbacks.figures import Figures
from lm.training.division import Division
from lm.training.guard import Guard, Later, clip, global_norm, local
from lm.training.loggers.step_log import StepLog
from lm.training.objectives import CrossEntropy
from lm.training.schedules import Schedule

SMALL = 1 << 20  # parameters


class Step:
    """Takes optimizer steps, one after another.

    Args:
        objective: What is minimised.
        schedule: Factor on the learning rate, a pure function of the step.
        clip_norm: Largest global norm of each network's gradient; None for no limit.
        guard: Decides what to do with a step whose loss or gradient is not finite, or whose loss is a spike.
        log: Averages losses between two logged steps.
    """

    def __init__(
        self, objective: CrossEntropy, schedule: Schedule, clip_norm: float | None, guard: Guard, log: StepLog
    ) -> None:
        self.objective, self.schedule, self.clip_norm, self.guard, self.log = objective, schedule, clip_norm, guard, log
        self.division = Division()
        self.questions: dict[Any, Callable[[], float]] = {}
        """By name, other numbers that are summed over the ranks together with a step's loss, before the update."""
        self.answers: dict[Any, float] = {}
        self.check: Callable[[Tensor | float], None] = lambda loss: None
        """Called with the step's loss once its gradient is complete, before clipping."""
        self.notices: list[str] = []
        """What the console should say, and has not said yet."""
        self.metrics: dict[str, float] = {}
        """The newest training metrics, "step" among them."""
        self.watching: list[Figures] = []
        """The callbacks that record figures of the step in progress."""
        self.losses: list[Tensor] = []
        """The losses of the step in progress, one for each micro-batch."""
        self._targets: list[Tensor] = []
        self._loss: Tensor | float = math.nan  # mean over the predictions of all micro-batches and ranks
        self._norm = torch.zeros(())
        self._taken = True  # whether the step in progress is trusted, as far as is known
        self._undecided: tuple[int, Tensor, Later] | None = None  # a step's number, its loss, and both numbers to judge

    def configure(self, nets: Sequence[nn.Module], optimizer: Optimizer) -> None:
        """Set the networks, of which callbacks record the first, and their optimizer."""
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        # walking the module for them would cost a tenth of a small network's step
        self.net, self._parts = nets[0], [[p for p in net.parameters() if p.requires_grad] for net in nets]
        self.fitted = [p for part in self._parts for p in part]
        assert sorted(map(id, grouped)) == sorted(map(id, self.fitted)), "each parameter belongs to exactly one group"
        # saves a tenth of a small network's step: one norm of a copy costs half of what all parameters' norms do
        self._small = (
            sum(p.numel() for p in self.fitted) < SMALL
            and len({(p.dtype, p.device) for p in self.fitted}) == 1
            and not any(isinstance(p, DTensor) for p in self.fitted)
        )
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    def start(self, trainer: Trainer, write: Callable[[dict[str, Any], int], None]) -> None:
        """Start training; the configuration's learning rates and weight decay win over a checkpoint's.

        Args:
            trainer: Read once: asking it at every step would cost a tenth of a small network's step.
            write: Passes metrics and their step to the loggers.
        """
        self._trainer, self._write, self._max_steps = trainer, write, trainer.max_steps
        (self._optimizer,) = trainer.optimizers
        self._groups = self._optimizer.param_groups
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._leaves_out = self._can_leave_out()
        self._log_every: int = trainer.log_every_n_steps or self._max_steps  # type: ignore[attr-defined]
        for group, settings in zip(self._groups, self._settings, strict=True):
            group.update(settings)
        if done := trainer.global_step:  # a run that resumes at its end saves the rate of its last step, as it was
            self._set_rates(done - 1)
        self.log.start(trainer, self._targets, self._optimizer, self._settings)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._watchers = [callback for callback in callbacks if isinstance(callback, Figures)]

    def _can_leave_out(self) -> bool:
        """Return whether a GPU can leave out an update by itself, so that this process need not wait for its loss.

        Fused optimizers can, as loss scalers tell them to.
        """
        device, alone = self.fitted[0].device.type, self.division.parts == 1
        fused = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        return fused and alone and device not in ("cpu", "mps") and self._scaler is None and self.guard.spike is None

    # -- in this order

    def take(self, number: int, gradient: Callable[..., Any], *batch: Tensor) -> None:
        """Take one step on a batch that is not divided, without Lightning's wrapper.

        Args:
            number: Of the step, counted from 1.
            gradient: Sets the parameters' gradients to a batch's: forward and backward pass.
            batch: What it takes: tokens (B, T) and targets, (B, T) or (B,).
        """
        self.begin(number - 1)
        for watcher in self.watching:
            watcher.before_step(self.net)
        gradient(*batch)
        self.update(number)

    def begin(self, done: int) -> None:
        """Set the learning rate of the step after `done` finished ones, and find the callbacks that record it."""
        self.losses.clear()
        self._targets.clear()
        self.watching = [watcher for watcher in self._watchers if watcher.due(done + 1)]
        self._set_rates(done)

    def _set_rates(self, done: int) -> None:
        factor = self.schedule(done, self._max_steps)
        for group, settings in zip(self._groups, self._settings, strict=True):
            group["lr"] = settings["lr"] * factor

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return a micro-batch's loss, whose backward pass follows.

        Args:
            logits: (B, T, V), or (B, V) of a fixed context.
            targets: (B, T), or (B,).

        Raises:
            UserError: Their shapes do not match.
        """
        if logits.shape[:-1] != targets.shape:
            raise UserError(
                f"model.net {type(self.net).__name__} gives logits {tuple(logits.shape)}, the data has targets "
                f"{tuple(targets.shape)}: fixed contexts need LinesData with targets last, others targets all; "
                "ClassData needs Encoder"
            )
        loss = self.objective(logits, targets, self.division)  # ()
        self.note(loss, targets)
        return loss

    def note(self, loss: Tensor, targets: Tensor) -> None:
        """Keep a micro-batch's loss and targets until the step ends."""
        self.losses.append(loss.detach())
        self._targets.append(targets)

    def update(self, number: int) -> None:
        """Do all that follows the backward pass of the step's last micro-batch, without Lightning's wrapper."""
        self.settle(number)
        self._optimizer.step()
        lightning_internals.count_step(self._trainer)
        self.finish(number)

    def settle(self, number: int) -> None:
        """Reduce the loss, compute the gradient's norm, check that both are finite, and clip: all before the update.

        Args:
            number: Of the step, counted from 1.

        Raises:
            CheckError: They are not finite, or the step's before were not, and the run is to stop there.
        """
        self.decide()
        if self._scaler is not None and getattr(self._optimizer, "_step_supports_amp_scaling", False):
            # Lightning leaves unscaling to a fused optimizer, and clips while gradients are still scaled (issue 9694)
            self._scaler.unscale_(self._optimizer)
        parts = [[p.grad for p in part if p.grad is not None] for part in self._parts]  # of each network
        gradients = [gradient for part in parts for gradient in part]
        loss = self._reduce(gradients)
        self.check(loss)
        if self._small and self.clip_norm is None:
            norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
        else:
            norms = [global_norm(part) for part in parts]
            norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        self._loss, self._norm = loss, norm
        if self._leaves_out:
            self._optimizer.found_inf = None  # type: ignore[attr-defined]
        if self._leaves_out and not (self.watching or self.guard.in_a_row or self.is_logged(number)):
            self._decide_later(number, loss, norm)
        elif not self._trusted(number, loss, norm):
            for parameter in self.fitted:  # without a gradient, an optimizer leaves a parameter alone
                parameter.grad = None
            return
        if self.clip_norm is not None:
            for part, its_norm in zip(parts, norms, strict=True):  # or a value network would scale the policy's down
                clip(part, self.clip_norm, its_norm)
        for watcher in self.watching:
            watcher.before_update(self.net)

    def _reduce(self, gradients: list[Tensor]) -> Tensor | float:
        """Return the step's loss over all micro-batches and ranks; scale the gradient by the factor it still lacks."""
        if self.division.parts == 1:
            return self.losses[0]
        others = [ask() for ask in self.questions.values()]
        loss, factor, others = self.division.share(self.losses, self._targets, others)
        self.answers = dict(zip(self.questions, others, strict=True))
        if factor != 1:
            torch._foreach_mul_(local(gradients), factor)
        return loss

    def _trusted(self, number: int, loss: Tensor | float, norm: Tensor) -> bool:
        guard, scaled = self.guard, self._scaler is not None
        self._taken = True
        if guard.spike is None and not guard.in_a_row and math.isfinite(loss if scaled else loss + norm):
            return True
        self._taken = self._heard(guard.verdict(number, float(loss), float(norm), scaled=scaled))
        return self._taken

    def _heard(self, notice: str | None) -> bool:
        """Keep what the guard said of a step; return whether it was trusted."""
        if notice is not None:
            self.notices.append(notice)
        return notice is None

    def _decide_later(self, number: int, loss: Tensor | float, norm: Tensor) -> None:
        """Let the GPU leave out the update where the guard would; `decide` hears of it a step later."""
        assert isinstance(loss, Tensor)
        both = torch.stack([loss.double(), norm.double()])  # (2)
        self._optimizer.found_inf = (~both.sum().isfinite()).float()  # type: ignore[attr-defined]
        self._undecided = number, loss, Later(both)

    def decide(self) -> None:
        """Let the guard judge the step that was not waited for, if there is one: before anything depends on it.

        Raises:
            CheckError: The run is to stop before that step, which was not taken.
        """
        if self._undecided is None:
            return
        (number, loss, both), self._undecided = self._undecided, None
        try:
            taken = self._heard(self.guard.verdict(number, *both.read(), scaled=False))
        except CheckError:
            lightning_internals.take_back_step(self._trainer)
            raise
        self._count(number, loss, taken)

    def _count(self, number: int, loss: Tensor | float, taken: bool) -> None:
        """Add a step to the metrics."""
        if taken:
            self.log.add(loss)
        else:
            self._write({"train/skipped": self.guard.skipped}, number)

    def finish(self, number: int) -> None:
        """Do what follows the update: figures and metrics."""
        if self._undecided is None:
            self._count(number, self._loss, self._taken)
        for watcher in self.watching:
            watcher.after_step(self.net, number)
        if self.is_logged(number):
            self.metrics = self.log.line(number, self._loss, self._norm)
            self._write({f"train/{key}": value for key, value in self.metrics.items() if key != "step"}, number)

    def is_logged(self, number: int) -> bool:
        """Return whether a step's metrics are written."""
        return number % self._log_every == 0 or number in (1, self._max_steps)


def each_step(done: int, most: int, per_call: int, stack: Iterable[Tensor]) -> Iterable[tuple[Any, ...]]:
    """Yield the steps of a stack of batches that are not taken yet: each one's number, counted from 1, and its batch.

    Args:
        done: Finished steps; some of the stack's may be among them.
        most: The step after which training ends.
        per_call: Steps of a stack.
        stack: Tokens (K, B, T) and targets (K, B, …).
    """
    first = done - done % per_call
    batches = zip(*(one.unbind() for one in stack), strict=True)  # K of (B, T) and (B, …)
    for number, batch in enumerate(batches, first + 1):
        if done < number <= most:
            yield number, *batch
