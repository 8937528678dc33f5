"""Processes that measure by turns: order, errors, ends."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lm.errors import CheckError, UserError
from lm.planning.turns import Turns


def note(file: str, name: str, wait: Any) -> None:
    """Write a name for each turn; report how many there were."""
    report: Any = f"{name} is ready"
    for count in range(1, 100):
        order = wait(report)
        with open(file, "a") as out:
            out.write(f"{name}{order}")
        report = count


def test_they_take_turns_forwards_and_backwards(tmp_path: Path) -> None:
    file = str(tmp_path / "order")
    with Turns(1) as turns:
        assert [turns.add(note, file, name) for name in "abc"] == ["a is ready", "b is ready", "c is ready"]
        assert turns.take(1, 7) == 1
        assert turns.rounds([1, 2, 3], 2) == [[1, 2], [2, 3], [1, 2]]
        processes = turns._processes
    assert Path(file).read_text() == "b7" + "a1b2c3" + "c3b2a1"
    assert [process.exitcode for process in processes] == [0, 0, 0]


def fail(error: Exception, wait: Any) -> None:
    raise error


def die(wait: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LM_DEBUG", raising=False)
    with Turns(1) as turns:
        for error, kind, text in (
            (UserError("data: there is none"), UserError, "^data: there is none$"),
            (CheckError("it differs"), CheckError, "^it differs$"),
            (ZeroDivisionError("by zero"), CheckError, "^ZeroDivisionError: by zero$"),
            (MemoryError(), UserError, "memory does not suffice"),
        ):
            with pytest.raises(kind, match=text):
                turns.add(fail, error)
        with pytest.raises(CheckError, match="killed by SIGKILL"):
            turns.add(die)


def leave_a_sign(file: str, wait: Any) -> None:
    try:
        wait("ready")
    finally:
        Path(file).write_text("ended")


def test_they_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Even where that is killed: each sees that nobody holds the other end of its pipe, though others came later."""
    signs = [tmp_path / name for name in "ab"]
    parent = os.fork()
    if not parent:
        turns = Turns(1)
        for sign in signs:
            turns.add(leave_a_sign, str(sign))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not all(sign.exists() for sign in signs):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def work(file: str, wait: Any) -> None:
    Path(file).write_text(str(os.getpid()))
    wait("ready")
    time.sleep(60)  # as it compiles: it reads no pipe


def test_so_does_one_at_work(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    parent = os.fork()
    if not parent:
        turns = Turns(1)
        turns.add(work, str(file))
        turns.take(0, 1)
        os._exit(0)
    while not file.exists() or not file.read_text():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 10
    while (stat := Path("/proc", file.read_text(), "stat")).exists() and " Z " not in stat.read_text():
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.05)
