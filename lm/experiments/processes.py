"""A sweep's processes: trials, forked by one that has imported all that they need."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.errors import CheckError, UserError

SERVER = "lm.cli.forks"


@dataclass
class Process:
    """A trial's process.

    Args:
        connection: Where it reports evaluations.
        pid: Its number; 0 until it is there.
        began: When it was asked for.
    """

    connection: socket.socket
    pid: int = 0
    began: float = field(default_factory=time.monotonic)

    def answer(self, stop: bool) -> None:
        """Answer a report."""
        with suppress(OSError):  # it was killed meanwhile
            self.connection.sendall(json.dumps({"stop": stop}).encode())


class Processes:
    """Starts trials, and hears of them.

    Args:
        environment: Variables of all of them.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self.running: dict[int, Process] = {}
        """The process of each slot."""
        self._start()

    def _start(self) -> None:
        """Start the process that is forked, which goes on importing meanwhile."""
        self.server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", SERVER, str(theirs.fileno())]
        known = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", **self._environment}  # a fork can use no CUDA
        self.process = subprocess.Popen(words, env=known, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()

    def check(self, files: list[Path]) -> None:
        """Have recipes parsed.

        Raises:
            UserError: One is none.
        """
        while True:
            message = b""
            with suppress(OSError):  # it was killed
                self.server.sendall(json.dumps({"check": [str(file) for file in files]}).encode())
                message = self.server.recv(1 << 20)
            if message:
                break
            self.restart()
        if (wrong := json.loads(message)["checked"]) is not None:
            raise UserError(wrong)

    def begin(self, slot: int, **request: Any) -> None:
        """Start a trial in a slot."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.running[slot] = Process(ours)
        with suppress(OSError):  # it was killed: `hear` will find that out
            socket.send_fds(self.server, [json.dumps({"slot": slot, **request}).encode()], [theirs.fileno()])
        theirs.close()

    def hear(self, seconds: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what is heard: a slot, and {"step", "values"} of an evaluation or {"code"} of an end."""
        sockets = {one.connection: slot for slot, one in self.running.items()}
        ready = select.select([self.server, *sockets], [], [], seconds)[0]
        for connection in ready:
            if connection is self.server:
                continue
            message = b""
            with suppress(OSError):
                message = connection.recv(1 << 20)
            if message:
                yield sockets[connection], json.loads(message)
            else:
                select.select([self.server], [], [], 0.05)  # its end is told there
        if self.server not in ready and not select.select([self.server], [], [], 0)[0]:
            return
        message = b""
        with suppress(OSError):
            message = self.server.recv(1 << 20)
        if not message:
            yield from self._all_ended()
            return
        found = json.loads(message)
        if "began" in found and found["slot"] in self.running:
            self.running[found["slot"]].pid = found["began"]
        for slot in [slot for slot, one in self.running.items() if one.pid == found.get("ended")]:
            yield from self._last_reports(slot)
            yield slot, {"code": found["code"], "seconds": self._drop(slot)}

    def _drop(self, slot: int) -> float:
        """Forget a slot's process, and return how many seconds it took."""
        one = self.running.pop(slot)
        one.connection.close()
        return time.monotonic() - one.began

    def _last_reports(self, slot: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what a process that has ended had still reported."""
        connection = self.running[slot].connection
        while select.select([connection], [], [], 0)[0]:
            message = b""
            with suppress(OSError):
                message = connection.recv(1 << 20)
            if not message:
                return
            yield slot, json.loads(message)

    def _all_ended(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The process that is forked was killed, and its trials with it: start it again."""
        for slot in [*self.running]:
            one = self.running[slot]
            _kill(one.pid)
            with suppress(OSError):
                while one.connection.recv(1 << 20):  # until it is gone
                    pass
            yield slot, {"code": -signal.SIGKILL, "seconds": self._drop(slot)}
        self.restart()

    def restart(self) -> None:
        """Start the process that is forked again.

        Raises:
            CheckError: It was not killed: it fails.
        """
        self.server.close()
        if (code := self.process.wait()) >= 0:
            raise CheckError(f"no trial can be started: python -m {SERVER} ended with {code}: see above")
        self._start()

    def stop(self, seconds: float) -> None:
        """Let all trials save and end, and wait so long for that; then end what is left."""
        for one in self.running.values():
            if one.pid:
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGTERM)
        end = time.monotonic() + seconds
        while self.running and (left := end - time.monotonic()) > 0:
            for slot, message in self.hear(min(left, 1.0)):
                if "step" in message and slot in self.running:
                    self.running[slot].answer(False)
        self.close()

    def close(self) -> None:
        """End all processes."""
        self.server.close()
        if self.running:  # it ends them first
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.process.kill()
        self.process.wait()


def _kill(pid: int) -> None:
    if pid:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def memory_kills() -> int:
    """Return how many processes of this control group the kernel has killed for want of memory."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
