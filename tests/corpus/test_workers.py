"""Encoding in several processes."""

import os
import signal

import pytest

from lm.corpus.workers import DocumentBatch, Encoded, ordered
from lm.errors import Stopped, UserError, stops_wait, take_stops


def killed(batch: DocumentBatch) -> Encoded:
    os._exit(9)


def test_a_worker_that_is_killed_ends_in_a_line() -> None:
    batch = DocumentBatch([], (0, 0, 0, 0), 0, 0, 0)
    with (
        pytest.raises(UserError, match="`workers`: a process that encodes has ended"),
        ordered(killed, [batch], 2) as done,
    ):
        list(done)


def test_a_stop_waits_until_a_process_has_been_started() -> None:
    """Its exception, inside the start, would leave that process with half of what it reads."""
    order: list[str] = []

    def stop(signum: int, frame: object) -> None:
        order.append("stopped")
        raise Stopped(signum)

    def start() -> None:
        with stops_wait():
            signal.raise_signal(signal.SIGTERM)
            order.append("started")

    before = take_stops(stop)
    try:
        with pytest.raises(Stopped):
            start()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert order == ["started", "stopped"]
