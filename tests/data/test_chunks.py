from functools import partial

import numpy as np
import pytest
import torch

from lm.data.chunks import From, Stream, draw
from lm.data.examples import Running, numbered

IDS = np.arange(1000, dtype=np.uint16)
FROZEN = [904727, 686256, 469840, 26539]


def batch_of_step(step: int, world_size: int, accumulate: int, seed: int = 3) -> list[tuple[int, ...]]:
    """All sequences of a step's global batch, over ranks and micro-batches, sorted."""
    rows = []
    for rank in range(world_size):
        size = 8 // (world_size * accumulate)
        examples = partial(numbered, Running(IDS, 8, "random", seed))
        chunks = Stream(examples, micro_batch_size=size, rank=rank, world_size=world_size)
        for k in range(step * accumulate, (step + 1) * accumulate):
            tokens, targets = chunks[k]
            assert torch.equal(tokens[:, 1:], targets[:, :-1])
            rows += [tuple(row) for row in tokens.tolist()]
    return sorted(rows)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (4, 1), (2, 2), (8, 1), (1, 8)])
def test_the_global_batch_does_not_depend_on_how_it_is_divided(world_size: int, accumulate: int) -> None:
    for step in (0, 1, 17):
        assert batch_of_step(step, world_size, accumulate) == batch_of_step(step, 1, 1)


def test_steps_and_seeds_differ() -> None:
    batches = [batch_of_step(step, 1, 1, seed) for step in range(20) for seed in (0, 1, -1)]
    assert len({tuple(batch) for batch in batches}) == 60


def test_draw_is_what_it_always_was() -> None:
    # frozen: a change here would change every run that is resumed
    assert draw(1337, 0, 4, 1_000_003).tolist() == FROZEN
    assert draw(1337, 2, 2, 1_000_003).tolist() == FROZEN[2:]


def test_draw_is_uniform() -> None:
    counts = np.bincount(draw(5, 10**12, 200_000, 100), minlength=100)
    assert ((counts - 2000) ** 2 / 2000).sum() < 150  # chi-squared, 99 degrees of freedom: 99.9 % quantile 148
    both = draw(5, 0, 100_000, 1 << 20), draw(6, 0, 100_000, 1 << 20)
    assert abs(np.corrcoef(*both)[0, 1]) < 0.02


def test_every_offset_can_be_drawn_and_none_past_the_end() -> None:
    starts = numbered(Running(IDS[:12], 8, "random", 0), first=0, count=64)[0][:, 0]
    assert set(starts.tolist()) == {0, 1, 2, 3}


def test_from_goes_on_where_it_is_told() -> None:
    start = [5]
    sampler = From(lambda: start[0])
    first = iter(sampler)
    assert [next(first), next(first)] == [5, 6]
    start[0] = 40
    assert next(iter(sampler)) == 40
