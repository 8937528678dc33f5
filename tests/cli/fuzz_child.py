"""Runs `lm` once for each line of JSON on standard input, each time in a fork of a process that has all imported.

A fork has limits on memory and time; that it dies or does not end is told like an exit code.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time

from lm.cli import COMMANDS, main

MEMORY = 6 << 30
SECONDS = 30


def child(words: list[str], folder: str) -> None:
    """Run `lm` in this process, and end it."""
    code = 70  # an exception that nobody caught
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, "../out"), (2, "../err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(words: list[str], folder: str) -> int | str:
    """Return the exit code of `lm`, or how it ended otherwise."""
    pid = os.fork()
    if pid == 0:
        child(words, folder)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"not done after {SECONDS} s"


if __name__ == "__main__":
    for module, _ in COMMANDS.values():
        importlib.import_module(module.split(":")[0])
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(outcome(task["words"], task["folder"])), flush=True)
