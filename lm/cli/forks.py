"""`python -m lm.cli.forks N`: a process that has imported all that `lm fit` needs, and becomes a trial by a fork.

A new interpreter for each trial would import torch and Lightning again, which takes as long as a short trial. This one
computes nothing, so that it has no threads, which a fork would lose. It ends with the sweep that started it, and takes
its trials with it. Messages are JSON on the socket whose number is N.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import traceback
from typing import Any

from lm.errors import CommandError
from lm.planning.turns import DIES_WITH_ITS_PARENT

NEEDED = ("lm.cli.fit", "lm.data.text", "torch.utils.tensorboard")


def serve(connection: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Make a process for each request; return the request and its socket in that process, None at the end."""
    wake, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):  # they are the sweep's to act on
        signal.signal(signum, signal.SIG_IGN)
    living: set[int] = set()
    while True:
        waited: list[Any] = [connection, wake]
        ready = select.select(waited, [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
            for pid in [*living]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    living.discard(pid)
                    tell_sweep(connection, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})
        if connection not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
        if not message:
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        request = json.loads(message)
        if "check" in request:
            tell_sweep(connection, {"checked": check(request["check"])})
            gc.freeze()  # or a collection in a trial would copy all of it
            continue
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            os.setpgid(0, 0)  # a group, so that its ranks end with it
            signal.set_wakeup_fd(-1)
            for number in (connection.detach(), wake, tell):
                os.close(number)
            return request, descriptors[0]
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # whichever of the two comes first
        living.add(pid)
        os.close(descriptors[0])
        tell_sweep(connection, {"began": pid, "slot": request["slot"]})


def tell_sweep(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message, unless the sweep has gone."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode())


def check(files: list[str]) -> str | None:
    """Parse recipes, which also warms what parsing the trials' needs; return the first error, which names the file."""
    from lm.cli import parsing

    for i, file in enumerate(files):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                recipe = parsing.Untrained(["--config", file], "")
                if i == 0:
                    recipe.set_up_data()
        except Exception as error:
            text = error.text if isinstance(error, CommandError) else f"{type(error).__name__}: {error}"
            return text if file in text else f"{file}: {text}"
    return None


def become(request: dict[str, Any], number: int) -> None:
    """Take over a trial's output, environment, cores and command line."""
    import numpy as np
    import torch

    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the sweep stops its trials itself
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.update(request["environment"])
    os.environ["LM_TRIAL"] = json.dumps({"socket": number, "settings": request["settings"]})
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    torch.set_num_threads(request["threads"])
    random.seed()
    np.random.seed()
    sys.argv = ["lm", "fit", "--config", request["recipe"], "--ckpt_path", "auto"]


def main() -> None:
    """Serve, and be `lm fit` in each process that is made."""
    gc.disable()  # imported objects stay; searching them for garbage takes half a second
    for module in NEEDED:
        importlib.import_module(module)
    import torch

    from lm.cli import parsing

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parsing.quiet()
    trial = serve(socket.socket(fileno=int(sys.argv[1])))
    if trial is None:
        os._exit(0)
    trial[0]["threads"] = trial[0]["threads"] or threads
    code: Any = 1
    try:
        become(*trial)
        runpy.run_module("lm", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)  # taking apart what was imported takes a second


if __name__ == "__main__":
    main()
