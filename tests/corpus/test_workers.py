"""Encoding in several processes."""

import os

import pytest

from lm.corpus.workers import Batch, Encoded, ordered
from lm.errors import UserError


def killed(batch: Batch) -> Encoded:
    os._exit(9)


def test_a_worker_that_is_killed_ends_in_a_line() -> None:
    batch = Batch([], (0, 0, 0, 0), 0, 0, 0)
    with (
        pytest.raises(UserError, match="--workers: a process that encodes was killed"),
        ordered(killed, [batch], 2) as done,
    ):
        list(done)
