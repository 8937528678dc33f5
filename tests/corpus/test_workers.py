"""Encoding in several processes."""

import os

import pytest

from lm.corpus.workers import DocumentBatch, Encoded, ordered
from lm.errors import UserError


def killed(batch: DocumentBatch) -> Encoded:
    os._exit(9)


def test_a_worker_that_is_killed_ends_in_a_line() -> None:
    batch = DocumentBatch([], (0, 0, 0, 0), 0, 0, 0)
    with (
        pytest.raises(UserError, match="--workers: a process that encodes was killed"),
        ordered(killed, [batch], 2) as done,
    ):
        list(done)
