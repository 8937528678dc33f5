"""A process that has imported all that `lm` needs, and becomes one more `lm` by a fork whenever a test asks for it.

An interpreter of its own would import torch and Lightning first, which takes three seconds. What is imported is all
that such a process has in common with others: it has its own arguments, environment, folder, streams and signals.
"""

import atexit
import gc
import io
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.utils.tensorboard
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only
from lightning.pytorch.strategies.launchers import subprocess_script

import lm.cli.doctor
import lm.cli.evaluate
import lm.cli.export
import lm.cli.fit
import lm.cli.gradients
import lm.cli.plan
import lm.cli.prepare
import lm.cli.sample
import lm.cli.serve
import lm.cli.tokenizer
import lm.data.text  # noqa: F401
from tests.support.processes import NEWS


def serve(listener: socket.socket) -> dict[str, Any]:
    """Make a process for each request, and return the request in that process.

    The end of a connection ends its processes, and that of the last one the server.
    """
    wake, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the tests' terminal is meant for them
    living: dict[int, tuple[int, socket.socket]] = {}  # each process: where its news go, and who asked for it
    connections = [listener.accept()[0]]
    while connections:
        ready = select.select([listener, wake, *connections], [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
            for pid, status in [(pid, os.waitpid(pid, os.WNOHANG)) for pid in living]:
                if status[0]:
                    news = living.pop(pid)[0]
                    with suppress(BrokenPipeError):  # nobody waits for it
                        os.write(news, NEWS.pack(*status))
                    os.close(news)
        if listener in ready:
            connections.append(listener.accept()[0])
        for connection in [one for one in connections if one in ready]:
            request, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 4)
            if not request:
                connections.remove(connection)
                connection.close()
                for pid in [pid for pid, (_, asked) in living.items() if asked is connection]:
                    os.kill(pid, signal.SIGKILL)
                continue
            pid = os.fork()
            if not pid:
                ours = [listener.detach(), *(one.detach() for one in connections)]
                for number in (*ours, wake, tell, *(news for news, _ in living.values())):
                    os.close(number)
                return take_over(json.loads(request), *descriptors)
            living[pid] = descriptors.pop(), connection
            for number in descriptors:
                os.close(number)
    os._exit(0)


def take_over(request: dict[str, Any], stdin: int, stdout: int, stderr: int, news: int) -> dict[str, Any]:
    """Take over the streams and signals that a new process has, and say that it is there."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate((stdin, stdout, stderr)):
        os.dup2(stream, number)
        os.close(stream)
    if request["start_new_session"]:
        os.setsid()
    os.write(news, NEWS.pack(os.getpid(), 0))
    os.close(news)
    return request


def keep_spares(request: dict[str, Any]) -> dict[str, Any]:
    """Let Lightning's launcher start other ranks as forks of this process, made before there is anything in it."""
    spares: list[tuple[int, int]] = []
    for _ in range(request["spares"]):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            for other in (write, *(end for _, end in spares)):
                os.close(other)
            with open(read) as file:
                text = file.read()
            if not text:  # this process's starter ended without a need of it
                os._exit(0)
            return json.loads(text)
        os.close(read)
        spares.append((pid, write))

    class Spare(subprocess.Popen[bytes]):
        """A process that is there already, or a new interpreter where none is left."""

        def _execute_child(self, args: list[str], *more: Any) -> None:  # type: ignore[override]
            if not spares:
                super()._execute_child(args, *more)  # type: ignore[misc]
                return
            cwd, environment = more[4:6]
            assert args[:3] == [sys.executable, "-m", "lm.__main__"]
            self.pid, write = spares.pop(0)
            self._child_created = True
            with open(write, "w") as file:
                json.dump({"arguments": args[3:], "cwd": cwd or os.getcwd(), "environment": environment}, file)

    subprocess_script.subprocess = SimpleNamespace(Popen=Spare)
    return request


def standard_output() -> io.TextIOWrapper:
    """Return sys.stdout as a new interpreter makes it of what its standard output is, a file or a terminal say."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(1, "w", closefd=False)
    binary: Any = raw if unbuffered else io.BufferedWriter(raw)
    how = {"line_buffering": os.isatty(1), "write_through": unbuffered}
    return io.TextIOWrapper(binary, sys.stderr.encoding, "strict", "\n", **how)


def leave(code: int) -> None:
    """End as an interpreter does, but do not take apart what was imported: that takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Serve, and be `python -m lm` in each process that is made."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or a collection in a new process would copy all of it
    request = keep_spares(serve(socket.socket(fileno=int(sys.argv[1]))))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin, sys.stdout = io.TextIOWrapper(io.FileIO(0, closefd=False)), standard_output()
    rank_zero_only.rank = _get_rank() or 0  # read when it is imported
    random.seed()
    np.random.seed()
    sys.path[0] = request["cwd"]
    sys.argv = ["lm", *request["arguments"]]
    code: Any = 0
    try:
        runpy.run_module("lm", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    main()
