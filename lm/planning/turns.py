"""Measurements that take turns: each in a process of its own, so that none has another's memory, caches or threads.

While one measures, the others wait. A machine that is slower for a while is so for all of them.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from lm.errors import CheckError, CommandError, UserError, as_user_error, described, stops_wait, take_stops

DIES_WITH_ITS_PARENT = 1  # Linux' PR_SET_PDEATHSIG
Wait = Callable[[Any], Any]
"""Reports what was measured, and waits; returns what to measure next. At the end it raises SystemExit."""


class Turns(AbstractContextManager["Turns"]):
    """Processes that measure when they are told to.

    They are forks where that is safe: a GPU's context does not survive one.

    Args:
        threads: How many threads torch has in each.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._context: Any = get_context(
            "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
        )
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def add(self, measure: Callable[..., None], *arguments: Any) -> Any:
        """Start a process, which calls `measure` with the arguments and a `Wait`; return its first report."""
        ours, theirs = self._context.Pipe()
        self._pipes.append(ours)
        with stops_wait():
            process = self._context.Process(
                target=_measure, args=(theirs, [*self._pipes], self.threads, measure, arguments)
            )
            process.start()
        theirs.close()
        self._processes.append(process)
        return self._report(len(self._pipes) - 1)

    def take(self, number: int, order: Any) -> Any:
        """Let the process that was added as `number`, counted from 0, measure; return its report."""
        with suppress(OSError):  # it has ended: the report says how
            self._pipes[number].send_bytes(json.dumps(order).encode())
        return self._report(number)

    def rounds(self, orders: Sequence[Any], count: int) -> list[list[Any]]:
        """Let all measure by turns, forwards and backwards; return each one's reports.

        Args:
            orders: One for each process.
            count: How often each has its turn.
        """
        found: list[list[Any]] = [[] for _ in orders]
        for one in range(count):
            numbers: Iterable[int] = range(len(orders))
            for number in reversed([*numbers]) if one % 2 else numbers:
                found[number].append(self.take(number, orders[number]))
        return found

    def _report(self, number: int) -> Any:
        try:
            said = json.loads(self._pipes[number].recv_bytes())
        except (EOFError, OSError):
            self._processes[number].join()
            code = self._processes[number].exitcode
            died = (
                f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            )
            raise CheckError(f"a process that measured {died}: does memory suffice? LM_DEBUG=1 shows more") from None
        if "error" in said:
            raise (UserError if said["bad_input"] else CheckError)(said["error"])
        return said["report"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, which clean up after themselves."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=30)
            process.kill()


def _measure(
    pipe: Connection, others: list[Connection], threads: int, measure: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Be a process that measures: silent, and ended when nobody holds the other end of its pipe any more."""
    take_stops(lambda signum, frame: sys.exit(128 + signum))  # the parent's were waiting as it was forked
    if sys.platform == "linux":  # while it compiles, it reads no pipe
        ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGTERM)
    for other in others:  # this process's copies
        other.close()
    if not os.environ.get("LM_DEBUG"):
        sink = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(sink, stream)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(threads)

    def say(message: dict[str, Any]) -> None:
        with suppress(OSError):
            pipe.send_bytes(json.dumps(message).encode())

    def wait(report: Any) -> Any:
        say({"report": report})
        try:
            return json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            raise SystemExit(0) from None

    try:
        measure(*arguments, wait)
    except Exception as error:
        if os.environ.get("LM_DEBUG") and not isinstance(error, CommandError):
            raise
        known = error if isinstance(error, CommandError) else as_user_error(error)
        text = known.text if known else described(error)
        say({"error": text, "bad_input": isinstance(known, UserError)})
