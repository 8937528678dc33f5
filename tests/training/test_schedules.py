import math

import pytest

from lm.errors import UserError
from lm.training.schedules import Constant, Cosine, Linear, Schedule, Step, WarmupStableDecay


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 1, 50: 1, 100: 1}),
        (Constant(warmup_steps=4), {0: 1 / 5, 3: 4 / 5, 4: 1, 99: 1}),
        (Linear(), {0: 1, 25: 0.75, 100: 0, 120: 0}),
        (Linear(warmup_steps=20, min_factor=0.5), {19: 20 / 21, 20: 1, 60: 0.75, 100: 0.5}),
        (Cosine(), {0: 1, 50: 0.55, 100: 0.1, 200: 0.1}),
        (Cosine(warmup_steps=50, min_factor=0), {50: 1, 75: 0.5, 100: 0, 60: (1 + math.cos(math.pi / 5)) / 2}),
        (Step(milestones=[30, 60], factor=0.1), {29: 1, 30: 0.1, 59: 0.1, 60: 0.01}),
        (WarmupStableDecay(decay_fraction=0.2, min_factor=0.1), {0: 1, 80: 1, 90: 0.55, 100: 0.1, 130: 0.1}),
    ],
)
def test_factors(schedule: Schedule, expected: dict[int, float]) -> None:
    assert {step: schedule(step, 100) for step in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="warmup_steps is -1"):
        Constant(warmup_steps=-1)
    with pytest.raises(UserError, match="decay_fraction is 0"):
        WarmupStableDecay(decay_fraction=0)
