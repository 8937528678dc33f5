"""Make each file-system call of a command fail once, or kill the command there, and check that nothing is lost.

    python benchmarks/crash.py --every 5

A command runs once under strace, which lists the calls it makes on files of its folder. Then, for each of them, it runs
again from the same folder, and that call fails with EIO, ENOSPC, EROFS or EACCES, or the process gets SIGKILL there. A
trial is survived if the command ends with one line, every checkpoint is whole, and running the command again gives the
bytes of an undisturbed run. Last comes the power cut: the trace is replayed, up to each call, on a simulated disk that
loses what was not flushed, and the command runs again on what is left.

Prints a table: trials survived of those tried, by command and error. Needs Linux, strace, and the right to trace.
"""

import argparse
import csv
import importlib
import itertools
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from power_cut import TIME, Call, Disk, calls_of, lay, trace_options
from tensorboard.summary.writer import event_file_writer

from lm.checkpoints import checkpoint
from lm.cli import main as run_lm

ERRORS = ("EIO", "ENOSPC", "EROFS", "EACCES")
KILL, POWER = "SIGKILL", "power cut"
TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(300))
RECIPE: dict[str, Any] = {
    "trainer": {"max_steps": 6, "val_check_interval": 2, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1},
    "model": {
        "class_path": "lm.training.LanguageModel",
        "init_args": {"net": {"class_path": "lm.models.GPT", "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16}}},
    },
    "data": {
        "class_path": "lm.data.TextData",
        "init_args": {"corpus": "text.txt", "block_size": 16, "batch_size": 4, "val_fraction": 0.02},
    },
    "checkpoint": {"every_n_steps": 2, "keep_last": 1},
    "samples": {"max_new_tokens": 0},
    "figures": {"every_n_steps": 0},
}
FIT = ("fit", "--config", "crash.yaml", "--name", "run", "--ckpt_path", "auto")


class Command(NamedTuple):
    """What is tried: the command, what runs before it, undisturbed, and what it makes."""

    words: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    result: str = "out"


COMMANDS = {
    "save": Command(FIT, result="run"),
    "save, sharded": Command((*FIT, "--trainer.strategy", "fsdp2"), result="run"),
    "resume": Command(FIT, before=((*FIT, "--trainer.max_steps", "3"),), result="run"),
    "prepare": Command(("prepare", "--source", "text.txt", "--tokenizer", "char", "--output", "out", "--workers", "1")),
    "tokenizer": Command(
        ("tokenizer", "--source", "text.txt", "--vocab_size", "300", "--output", "o.tiktoken"), result="o.tiktoken"
    ),
    "export": Command(("export", "--ckpt_path", "checkpoints/run/last.ckpt", "--output", "out"), before=(FIT,)),
    "import": Command(
        ("import", "--source", "exported", "--output", "out"),
        before=(FIT, ("export", "--ckpt_path", "checkpoints/run/last.ckpt", "--output", "exported")),
    ),
}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    said: str


def run(folder: Path, words: tuple[str, ...], strace: Callable[[int], list[str]] | None = None) -> Ended:
    """Run `lm` in a folder, in a fork of this process, under strace where its options are given."""
    said = folder.parent / "said"
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setpgid(0, 0)
            os.chdir(folder)
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["LM_DATA_HOME"] = "data"
            if strace:  # names contain the time or a random number: here both are fixed
                event_file_writer.time = SimpleNamespace(time=lambda: 1e9)
                count = itertools.count()
                secrets.token_hex = lambda nbytes: f"{next(count):0{2 * nbytes}x}"
                os.kill(os.getpid(), signal.SIGSTOP)
            code = run_lm(words)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(code)
    if strace:
        os.waitpid(pid, os.WUNTRACED)
        tracer = subprocess.Popen(["strace", "-f", "-q", *strace(pid), "-p", str(pid)], stderr=subprocess.DEVNULL)
        while tracer.poll() is None and "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.001)
        time.sleep(0.01)
        os.kill(pid, signal.SIGCONT)
    code = wait(pid, seconds=60)
    if strace:
        tracer.wait()
    return Ended(code, said.read_text(errors="replace"))


def wait(pid: int, seconds: float) -> int:
    """Return a child's exit code, or minus the signal that ended it; one that does not end is killed: -999."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999


def traced(folder: Path, words: tuple[str, ...]) -> list[Call]:
    """Return the calls that a command makes on what lies in a folder."""
    trace = folder.parent / "trace"
    ended = run(folder, words, lambda pid: [*trace_options(), "-o", str(trace)])
    if ended.code:
        raise SystemExit(f"lm {' '.join(words)}: {ended.said}")
    return calls_of(trace, folder)


def injected(call: Call, number: int, error: str, folder: Path) -> Callable[[int], list[str]]:
    """Return strace's options that make the call of that number, among those of its kind on its path, fail.

    Args:
        call: One of a traced process.
        number: See `numbered`.
        error: An error's name, or SIGKILL.
        folder: Where the command runs.
    """
    fault = "signal=KILL" if error == KILL else f"error={error}"

    def options(pid: int) -> list[str]:
        path = re.sub(rf"\b{call.thread}\b", str(pid), call.operands[0])  # a part's name may have the process in it
        paths = ["-P", path, "-P", str(folder / path)]
        return [
            *paths,
            "-e",
            f"trace={call.name}",
            "-e",
            f"inject={call.name}:{fault}:when={number}",
            "-o",
            "/dev/null",
        ]

    return options


def whole(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint that is there."""
    for path in folder.glob("checkpoints/*/*.ckpt"):
        if problem := checkpoint.damage(path):
            return f"{path.name}: {problem}"
    return None


def outcome(folder: Path, result: str) -> Any:
    """Return those results of a command that must be equal."""
    if result == "run":
        kept = {path.name: checkpoint.load(path) for path in sorted(folder.glob("checkpoints/run/*.ckpt"))}
        states = {n: {k: v for k, v in c.items() if k not in ("start", "loops", "lm")} for n, c in kept.items()}
        with (folder / "logs/run/metrics.csv").open() as stream:
            rows = [{key: row[key] for key in row if "per_second" not in key} for row in csv.DictReader(stream)]
        return states, rows
    made = folder / result
    files = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): contents(file) for file in files}


def contents(file: Path) -> Any:
    """Return a file's bytes, or what is in it where it is a checkpoint: its archive has a number drawn at random."""
    try:
        return torch.load(file, weights_only=True)
    except Exception:
        return file.read_bytes()


def difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """Return where nested values are not the same to the bit, or None."""
    if isinstance(found, torch.Tensor):
        return None if torch.equal(found, wanted) else where
    if isinstance(found, dict) and isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"{where}: has {sorted(found, key=str)}, not {sorted(wanted, key=str)}"[:300]
        unlike = (difference(found[key], wanted[key], f"{where}/{key}") for key in found)
        return next(filter(None, unlike), None)
    if isinstance(found, list | tuple) and len(found) == len(wanted):
        unlike = (difference(*two, f"{where}/{i}") for i, two in enumerate(zip(found, wanted, strict=True)))
        return next(filter(None, unlike), None)
    return None if found == wanted else f"{where}: {found}, not {wanted}"[:300]


def goes_on(folder: Path, command: Command, wanted: Any) -> str | None:
    """Run the command again; return what is wrong with the result."""
    if problem := whole(folder):
        return problem
    ended = run(folder, command.words)
    complete = ended.code == 2 and "--overwrite" in ended.said  # its result was already complete
    if ended.code and not complete:
        return f"does not go on, {ended.code}: {ended.said[-600:]}"
    unlike = difference(outcome(folder, command.result), wanted)
    return unlike and f"is not what an undisturbed run makes: {unlike}"


def trial(start: Path, folder: Path, command: Command, wanted: Any, options: Any, killed: bool) -> str | None:
    """Run a command with a fault in a copy of a folder; return what is wrong with it, or with what comes after it."""
    copy(start, folder)
    ended = run(folder, command.words, options)
    lines = [line for line in ended.said.splitlines() if line.startswith("error:")]
    if "Traceback" in ended.said:
        return f"a traceback: {ended.said[-600:]}"
    if not killed and (ended.code not in (0, 2) or len(lines) != (ended.code == 2)):
        return f"exit code {ended.code}: {ended.said[-600:]}"
    return goes_on(folder, command, wanted)


def copy(start: Path, folder: Path) -> None:
    """Make a folder a copy of another."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder, symlinks=True)


def prepared(place: Path, command: Command) -> tuple[Path, Any, list[Call]]:
    """Return the folder that a command starts from, what it makes undisturbed, and the calls it takes."""
    start, folder = place / "start", place / "work"
    shutil.rmtree(start, ignore_errors=True)
    start.mkdir()
    (start / "text.txt").write_text(TEXT)
    os.utime(start / "text.txt", (TIME, TIME))
    (start / "crash.yaml").write_text(yaml.safe_dump(RECIPE))
    for words in command.before:
        if (ended := run(start, words)).code:
            raise SystemExit(ended.said)
    copy(start, folder)
    calls = traced(folder, command.words)
    return start, outcome(folder, command.result), calls


def numbered(calls: list[Call]) -> Iterator[tuple[Call, int]]:
    """Give each call its number among those of its thread, kind and path, as strace counts them."""
    seen: Counter[tuple[int, str, str]] = Counter()
    for call in calls:
        seen.update((call.thread, call.name, operand) for operand in set(call.operands))
        if call.operands and call.name not in ("close", "lseek"):
            yield call, seen[call.thread, call.name, call.operands[0]]


def disturb(place: Path, name: str, every: int, first: int, faults: str) -> tuple[int, dict[str, list[int]]]:
    """Try the faults on one in so many calls of a command; return how many calls, and survived and tried by fault."""
    command = COMMANDS[name]

    def say(problem: str) -> None:
        print(problem, file=sys.stderr, flush=True)

    start, wanted, calls = prepared(place, command)
    folder = place / "work"
    tries = [(*pair, error) for pair in numbered(calls) for error in (*ERRORS, KILL) if re.search(faults, error)]
    random.Random(0).shuffle(tries)  # so that one in so many is a sample of all kinds
    tally: dict[str, list[int]] = {error: [0, 0] for error in (*ERRORS, KILL, POWER)}
    for call, number, error in tries[first::every]:
        problem = trial(start, folder, command, wanted, injected(call, number, error, folder), error == KILL)
        tally[error][0] += problem is None
        tally[error][1] += 1
        if problem:
            say(f"{name}: {error} at {call.name} {number} of {call.operands[0]}: {problem}")
    cuts = list(Disk(start).cuts(calls)) if re.search(faults, POWER) else []
    for after, state in cuts[first::every]:
        shutil.rmtree(folder, ignore_errors=True)
        lay(state, folder)
        problem = goes_on(folder, command, wanted)
        tally[POWER][0] += problem is None
        tally[POWER][1] += 1
        if problem:
            say(f"{name}: power cut after {after.name} of {after.operands}: {problem}")
    return len(calls), tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="Of the faults, try one in so many.")
    parser.add_argument("--first", type=int, default=0, help="The number of the first.")
    parser.add_argument("--only", default="", help="Commands whose name matches this regular expression.")
    parser.add_argument("--faults", default="", help="Faults whose name matches this regular expression.")
    options = parser.parse_args()
    for command in ("export", "fit", "prepare", "tokenizer"):  # here, once: each trial is a fork of this process
        importlib.import_module(f"lm.cli.{command}")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    lost = 0
    print("| command | calls | " + " | ".join((*ERRORS, KILL, POWER)) + " |\n" + "| --- " * 8 + "|", flush=True)
    for name in COMMANDS:
        if re.search(options.only, name):
            with tempfile.TemporaryDirectory() as place:
                calls, tally = disturb(Path(place), name, options.every, options.first, options.faults)
            lost += sum(count - good for good, count in tally.values())
            figures = (f"{good} of {count}" for good, count in tally.values())
            print(f"| {name} | {calls} | " + " | ".join(figures) + " |", flush=True)
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
