"""Hit a training run with real-world faults, resume it, and compare it with an undisturbed run.

    python benchmarks/faults.py --times 50

Every trial is a run of real processes, two ranks over gloo, that is hit at a random moment and started again with
`--ckpt_path auto` until it ends. It survives if it ends as it should, leaves no process behind, and the finished run's
weights, optimizer state, random state and metrics equal those of the undisturbed one to the last bit. Prints a table:
trials, survivors, and the longest time from a fault to the end of the last process.

Full and read-only disks need root, to mount a small file system; jumps of the clock need Debian's package faketime.
"""

import argparse
import contextlib
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from fault_kinds import FAULTS, LIBRARY, ROOT, Fault, Job, jump_in_time, possible, remount

from lm.checkpoints import checkpoint

TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(3000))
RECIPE: dict[str, Any] = {
    "trainer": {"max_steps": 400, "val_check_interval": 100, "log_every_n_steps": 100, "accelerator": "cpu"},
    "model": {
        "class_path": "lm.training.LanguageModel",
        "init_args": {"net": {"class_path": "lm.models.GPT", "init_args": {"n_layer": 2, "n_head": 2, "n_embd": 64}}},
    },
    "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "text.txt", "block_size": 32, "batch_size": 8}},
    "checkpoint": {"every_n_steps": 10, "keep_last": 2},
    "samples": {"max_new_tokens": 0},
    "watch": {"timeout": 5, "meet_timeout": 20},
}


def trial(folder: Path, name: str, fault: Fault, codes: set[int] | None, length: float) -> tuple[str | None, float]:
    """Inject a fault at a random moment of a run, then finish it; return what went wrong and how long ending took."""
    job = Job(folder, name)
    time.sleep(random.uniform(0.3, length))
    took, problem = 0.0, None
    if job.process.poll() is None:
        began = time.monotonic()
        harm = fault(job)
        next(harm)
        if not job.end(90):
            problem = "still there after 90 s"
        took = time.monotonic() - began
        code = job.process.returncode
        if codes and code not in {0, *codes}:
            problem = f"exit code {code}"
        next(harm, None)
    return go_on(job) or problem, took


def go_on(job: Job) -> str | None:
    """Finish a run; return what went wrong."""
    for _ in range(2):
        job.start()
        if job.end(120) and job.process.returncode == 0:
            return None
    return f"does not go on: {(job.folder / (job.name + '.err')).read_text()[-500:]}"


def at_forward(number: int, signum: int, rank: int) -> tuple[str, str]:
    """Return the words that make a rank send itself a signal at a forward pass, counted from 1; 0 for none."""
    arguments = {"number": number, "signum": int(signum), "rank": rank}
    return "--trainer.callbacks", yaml.safe_dump(
        [{"class_path": "tests.support.stop.StopAtForward", "init_args": arguments}], default_flow_style=True
    )


def stop_at_a_forward_pass(folder: Path, name: str, number: int) -> tuple[str | None, float]:
    """Stop a run at a forward pass of its last steps or evaluation, then finish it."""
    signum, began = random.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT)), time.monotonic()
    job = Job(folder, name, *at_forward(number, signum, random.randrange(2)))
    problem = None if job.end(120) else "still there after 120 s"
    took = time.monotonic() - began
    if job.process.returncode not in (0, 128 + signum):
        problem = f"exit code {job.process.returncode}"
    return go_on(job) or problem, took


WRITERS = {
    "prepare": ("--source", "text.txt", "--tokenizer", "byte", "--workers", "1", "--output", "disk/corpus"),
    "tokenizer": ("--source", "text.txt", "--vocab_size", "300", "--output", "disk/words.tiktoken"),
    "export": ("--ckpt_path", "whole.ckpt", "--format", "safetensors", "--output", "disk/exported"),
    "import": ("--source", "exported", "--output", "disk/imported.ckpt"),
}
"""The other commands that write, and their words."""


def refuse(folder: Path, command: str, full: bool) -> str | None:
    """Make the disk refuse what a command writes, then accept it; return what went wrong."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        return "no file system can be mounted here"
    try:
        if full:
            left = random.randrange(4) << 12 if command != "tokenizer" else 0  # which writes a page or two
            (disk / "filler").write_bytes(bytes((8 << 20) - left - (1 << 12)))
            with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
                file.write(bytes(1 << 12))
        else:
            remount(disk, "ro")
        refused = call(folder, command)
        if refused.returncode != 2 or len(refused.stderr.splitlines()) != 1:
            return f"exit code {refused.returncode}: {refused.stderr[-500:]}"
        if full:
            (disk / "filler").unlink()
        else:
            remount(disk, "rw")
        taken = call(folder, command)
        return f"exit code {taken.returncode}, with room: {taken.stderr[-500:]}" if taken.returncode else None
    finally:
        subprocess.run(["umount", disk], check=True)


def call(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "lm", command, *WRITERS[command]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def outcome(folder: Path, name: str) -> tuple[dict, list]:
    """Return those results of a finished run that must be equal."""
    saved = checkpoint.load(folder / "checkpoints" / name / "last.ckpt")
    with (folder / "logs" / name / "metrics.csv").open() as stream:
        rows = [{key: row[key] for key in row if "tokens_per_second" not in key} for row in csv.DictReader(stream)]
    return {key: value for key, value in saved.items() if key not in ("start", "loops", "lm")}, rows


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)  # type: ignore[attr-defined,index]
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))  # type: ignore[arg-type]
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="Trials of each fault.")
    parser.add_argument("--only", help="Faults whose name matches this regular expression.")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="Copies of the network, or shares.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "checkpoints").mkdir()
        (folder / "text.txt").write_text(TEXT)
        recipe = RECIPE | {"trainer": RECIPE["trainer"] | {"strategy": options.strategy}}
        (folder / "faults.yaml").write_text(yaml.safe_dump(recipe))
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder / "checkpoints"]
        mounted = os.getuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
        try:
            run(folder, options.times, options.only or "")
        finally:
            if mounted:
                subprocess.run(["umount", folder / "checkpoints"], check=True)


def run(folder: Path, times: int, only: str) -> None:
    began = time.monotonic()
    if not (whole := Job(folder, "whole")).end(300) or whole.process.returncode:
        raise SystemExit((folder / "whole.err").read_text())
    length, wanted = time.monotonic() - began, outcome(folder, "whole")
    print("| fault | times | survived | ended after at most |\n| --- | --- | --- | --- |", flush=True)
    for what, (fault, codes) in FAULTS.items():
        if not re.search(only, what):
            continue
        if lack := possible(fault, folder):
            print(f"| {what} | 0 | {lack} | |", flush=True)
            continue
        survived, longest = 0, 0.0
        if fault is jump_in_time:
            (folder / "clock").write_text("+0")
            os.environ |= {
                "LD_PRELOAD": LIBRARY[0], "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
                "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        for number in range(times):
            name = f"{what.replace(' ', '-').replace(',', '')}-{number}"
            problem, took = trial(folder, name, fault, codes, length)
            longest = max(longest, took)
            if problem is None and not equal(wanted, outcome(folder, name)):
                problem = "goes on, to other numbers"
            if problem:
                print(f"{name}: {problem}", file=sys.stderr, flush=True)
            survived += problem is None
            shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
        os.environ.pop("LD_PRELOAD", None)
        print(f"| {what} | {times} | {survived} | {longest:.1f} s |", flush=True)
    run_last_passes(folder, times, only, wanted)
    run_writers(folder, times, only)


def run_last_passes(folder: Path, times: int, only: str, wanted: tuple[dict, list]) -> None:
    """Stop at each of the last forward passes, the last first."""
    what = "SIGTERM, SIGHUP or SIGINT at each forward pass of the last steps and evaluation"
    if not re.search(only, what):
        return
    if not Job(folder, "passes", *at_forward(0, signal.SIGTERM, 0)).end(300):
        raise SystemExit((folder / "passes.err").read_text())
    passes, survived, longest = int((folder / "passes").read_text()), 0, 0.0
    for number in range(passes, passes - times, -1):
        name = f"pass-{number}"
        problem, took = stop_at_a_forward_pass(folder, name, number)
        if problem is None and not equal(wanted, outcome(folder, name)):
            problem = "goes on, to other numbers"
        if problem:
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        survived, longest = survived + (problem is None), max(longest, took)
        shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    print(f"| {what} | {times} | {survived} | {longest:.1f} s |", flush=True)


def run_writers(folder: Path, times: int, only: str) -> None:
    """Make the disk refuse what the other commands write."""
    rows = {f"disk {how} under lm {command}": (command, how == "full") for command in WRITERS for how in ("full", "ro")}
    rows = {what.replace("disk ro", "disk read-only"): row for what, row in rows.items() if re.search(only, what)}
    if not rows:
        return
    checkpoint.copy(folder / "checkpoints/whole/last.ckpt", folder / "whole.ckpt")
    words = ("export", "--ckpt_path", "whole.ckpt", "--format", "safetensors", "--output", "exported")
    subprocess.run([sys.executable, "-m", "lm", *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for what, (command, full) in rows.items():
        began, problems = time.monotonic(), [refuse(folder, command, full) for _ in range(times)]
        for problem in filter(None, problems):
            print(f"{what}: {problem}", file=sys.stderr, flush=True)
        each = (time.monotonic() - began) / times
        print(f"| {what}, then with room | {times} | {problems.count(None)} | {each:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
