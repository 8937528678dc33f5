"""`lm` in a process of its own: a fork of one that has imported torch, or a fresh interpreter."""

import atexit
import functools
import json
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEWS = struct.Struct("qq")
"""What is said of a process, when it begins and when it ends: its number, and how it has ended."""


ADDRESS = "PROCESS_SERVER"
"""The variable that tells pytest's workers the address of the server that they share."""


def start_server() -> str:
    """Start a server and return its address; it takes requests while it still imports, and ends after its users."""
    address = f"lm-tests-{os.getpid()}"
    first = {
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        its = listener.fileno()
        words = [sys.executable, "-m", "tests.support.fork_server", str(its)]
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | first, pass_fds=[its], stdin=subprocess.DEVNULL
        )  # fmt: skip
    atexit.register(process.wait)  # after the connection is closed: what is registered last runs first
    return address


@functools.cache
def server() -> socket.socket:
    """Return this process's connection to the server: the one that pytest's workers share, or its own."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.connect(f"\0{os.environ.get(ADDRESS) or start_server()}")
    atexit.register(ours.close)
    return ours


def share_server() -> None:
    """Start the server for the workers that this process will start."""
    os.environ[ADDRESS] = start_server()
    server()


class Forked(subprocess.Popen[Any]):
    """A process that the server has made, in all else as subprocess has it.

    Args:
        words: The arguments of `lm`.
        ranks: How many processes it will be, itself among them.
        settings: As subprocess has them.
    """

    def __init__(self, words: list[str], *, ranks: int = 1, **settings: Any) -> None:
        self._spares = ranks - 1
        super().__init__(words, **settings)

    def _execute_child(  # type: ignore[override]
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
        errread: int, errwrite: int, restore_signals: Any, gid: Any, gids: Any, uid: Any, umask: Any,
        start_new_session: bool, *more: Any,
    ) -> None:  # fmt: skip
        assert preexec_fn is None and not pass_fds, "only a fresh interpreter can do that"
        request = {
            "arguments": args, "cwd": str(cwd), "environment": env, "spares": self._spares,
            "start_new_session": start_new_session,
        }  # fmt: skip
        self._news, news = os.pipe()
        streams = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        socket.send_fds(server(), [json.dumps(request).encode()], [*streams, news])
        os.close(news)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        self.pid = self._try_wait(0)[0]
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags and not select.select([self._news], [], [], 0)[0]:
            return 0, 0
        news = os.read(self._news, NEWS.size)
        assert news, "the server of processes has ended"
        return NEWS.unpack(news)

    def _internal_poll(self, *_: Any, **more: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode

    def _handle_exitstatus(self, status: int) -> None:
        super()._handle_exitstatus(status)  # type: ignore[misc]
        os.close(self._news)


def start(*arguments: object, cwd: Path, fresh: bool = False, ranks: int = 1, **settings: Any) -> subprocess.Popen[str]:
    """Start `lm` in a process of its own.

    Args:
        arguments: What follows `lm`.
        cwd: Where it works.
        fresh: Whether it is a new interpreter, three seconds slower: for what matters before or while it imports.
        ranks: How many processes the launcher will start on this machine; those that it has no fork for are fresh.
        settings: As subprocess has them; `environment` is added to this process's.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    environment |= settings.pop("environment", {})
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
    words = [str(one) for one in arguments]
    if fresh:
        return subprocess.Popen([sys.executable, "-m", "lm", *words], cwd=cwd, env=environment, **settings)
    return Forked(words, cwd=cwd, env=environment, ranks=ranks, **settings)
