"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state of theirs.

A schedule gives the factor on each parameter group's own learning rate. Steps are counted from 0; `max_steps` is the
length of the run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from lm.bounds import checked
from lm.errors import UserError


class Schedule(ABC):
    """A factor on the learning rate: a linear warm-up, then what the subclass says.

    Args:
        warmup_steps: Steps over which the factor rises from near 0 to 1.
    """

    @checked("schedule.", UserError)
    def __init__(self, *, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the factor for the update that follows `step` finished ones."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.after_warmup(step, max_steps)

    @abstractmethod
    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return the factor at a step that is past the warm-up."""

    def _progress(self, step: int, max_steps: int) -> float:
        """Return the progress of the decay, from 0 at the end of the warm-up to 1 at max_steps and after."""
        return min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))


def check(schedule: Callable[[int, int], float], first: int, max_steps: int) -> None:
    """Check a schedule before the first step, at a thousand of a run's steps and at the last.

    Raises:
        UserError: It fails there, or gives no finite factor of at least 0.
    """
    name = f"model.schedule {type(schedule).__name__}"
    for step in (*range(first, max_steps, 1 + max(0, max_steps - first) // 1000), max_steps - 1):
        try:
            factor = float(schedule(step, max_steps))
        except Exception as error:  # a user's own class may raise anything
            raise UserError(f"{name} fails at step {step + 1} of {max_steps}: {error!r}") from error
        if not 0 <= factor < math.inf:
            raise UserError(f"{name} gives {factor:g} at step {step + 1} of {max_steps}: it must be finite, at least 0")


class Constant(Schedule):
    """Stays at 1 after the warm-up."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return 1."""
        return 1.0


class Linear(Schedule):
    """Falls in a straight line from 1 to min_factor at the end of the run.

    Args:
        warmup_steps: Steps over which the factor rises from near 0 to 1.
        min_factor: Where it ends.
    """

    @checked("schedule.", UserError)
    def __init__(self, *, warmup_steps: int = 0, min_factor: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.min_factor = min_factor

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return 1 − progress, scaled to end at min_factor."""
        return 1 - (1 - self.min_factor) * self._progress(step, max_steps)


class Cosine(Schedule):
    """Falls along half a cosine from 1 to min_factor at the end of the run.

    Args:
        warmup_steps: Steps over which the factor rises from near 0 to 1.
        min_factor: Where it ends; GPT-3 and nanoGPT use 0.1.
    """

    @checked("schedule.", UserError)
    def __init__(self, *, warmup_steps: int = 0, min_factor: float = 0.1) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.min_factor = min_factor

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return (1 + cos(π progress)) / 2, scaled to end at min_factor."""
        half = 0.5 * (1 + math.cos(math.pi * self._progress(step, max_steps)))
        return self.min_factor + (1 - self.min_factor) * half


class Step(Schedule):
    """Multiplied by `factor` at each milestone; Karpathy's makemore lectures drop from 0.1 to 0.01 once.

    Args:
        milestones: Steps at which it falls.
        factor: What it is multiplied by at each.
        warmup_steps: Steps over which the factor rises from near 0 to 1.
    """

    @checked("schedule.", UserError)
    def __init__(self, *, milestones: list[int], factor: float = 0.1, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.milestones, self.factor = milestones, factor

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return factor to the power of the number of milestones reached."""
        return self.factor ** sum(step >= milestone for milestone in self.milestones)


class WarmupStableDecay(Schedule):
    """Stays at 1, then falls in a straight line over the last steps; until these begin, a run can be extended.

    Hu et al., "MiniCPM" (2024).

    Args:
        decay_fraction: Share of the run over which it falls.
        warmup_steps: Steps over which the factor rises from near 0 to 1.
        min_factor: Where it ends.
    """

    @checked("schedule.", UserError)
    def __init__(self, *, decay_fraction: float = 0.2, warmup_steps: int = 0, min_factor: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        self.decay_fraction, self.min_factor = decay_fraction, min_factor

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return 1, then the straight line."""
        decay_steps = max(1, round(self.decay_fraction * max_steps))
        left = min(1.0, max(0, max_steps - step) / decay_steps)
        return self.min_factor + (1 - self.min_factor) * left
