"""Do to a training what happens to it in the world, let it go on, compare its last checkpoint with an undisturbed one.

    python benchmarks/faults.py --times 50

Every trial is a run of real processes, two ranks over gloo, that is hit at a random moment and started again with
`--ckpt_path auto` until it ends. It has survived where weights, optimizer, random state and metrics are equal to the
last bit. Prints a line for each kind of fault: how many trials, how many survived, the longest time until a fault ended
the run.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(3000))
RECIPE = {
    "trainer": {"max_steps": 400, "val_check_interval": 100, "log_every_n_steps": 100, "accelerator": "cpu"},
    "model": {
        "class_path": "lm.training.LanguageModel",
        "init_args": {"net": {"class_path": "lm.models.GPT", "init_args": {"n_layer": 2, "n_head": 2, "n_embd": 64}}},
    },
    "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "text.txt", "block_size": 32, "batch_size": 8}},
    "checkpoint": {"every_n_steps": 10, "keep_last": 2},
    "samples": {"max_new_tokens": 0},
    "watch": {"timeout": 5},
}
IGNORED = ("start", "loops")


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "lm", "fit", "--config", "faults.yaml", "--name", name, "--ckpt_path", "auto"]
    return subprocess.Popen(
        [*words, "--trainer.devices", "2"], cwd=folder, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=(folder / f"{name}.err").open("ab"),
    )  # fmt: skip


def ranks(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes of the ranks; the second is there a few seconds after the first."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [process.pid, *(int(pid) for pid in listed.read_text().split())] if listed.exists() else []


def kill_a_rank(process: subprocess.Popen[bytes]) -> None:
    os.kill(random.choice(ranks(process)), signal.SIGKILL)


def kill_the_job(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def stop_a_rank(process: subprocess.Popen[bytes]) -> None:
    os.kill(random.choice(ranks(process)), signal.SIGSTOP)


def terminate_a_rank(process: subprocess.Popen[bytes]) -> None:
    os.kill(random.choice(ranks(process)), random.choice([signal.SIGTERM, signal.SIGUSR1]))


FAULTS: dict[str, Callable[[subprocess.Popen[bytes]], None]] = {
    "SIGKILL of a rank": kill_a_rank,
    "SIGKILL of the whole job": kill_the_job,
    "SIGSTOP of a rank": stop_a_rank,
    "SIGTERM or SIGUSR1 to a rank": terminate_a_rank,
}


def end(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a job to end; return whether it did, and end it if not."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        time.sleep(0.5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a dead rank 0 left, as a cluster's scheduler would


def trial(folder: Path, name: str, fault: Callable[[subprocess.Popen[bytes]], None], length: float) -> float:
    """Do a fault at a random moment of a run, then finish it; return the seconds until the fault ended it."""
    process = start(folder, name)
    time.sleep(random.uniform(0.3, length))
    took = 0.0
    if process.poll() is None:
        began = time.monotonic()
        fault(process)
        if not end(process, 60):
            raise SystemExit(f"{name}: still there a minute after its fault")
        took = time.monotonic() - began - 0.5
    for _ in range(3):
        process = start(folder, name)
        if end(process, 120) and process.returncode == 0:
            return took
    raise SystemExit(f"{name}: does not go on: see {folder / (name + '.err')}")


def last(folder: Path, name: str) -> dict:
    saved = torch.load(folder / "checkpoints" / name / "last.ckpt", weights_only=True)
    return {key: value for key, value in saved.items() if key not in (*IGNORED, "lm")}


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
    parser.add_argument("--only", help="A fault whose name contains this.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text.txt").write_text(TEXT)
        (folder / "faults.yaml").write_text(yaml.safe_dump(RECIPE))
        began = time.monotonic()
        assert end(start(folder, "whole"), 300)
        length, wanted = time.monotonic() - began - 0.5, last(folder, "whole")
        for what, fault in FAULTS.items():
            if options.only and options.only not in what:
                continue
            survived, longest = 0, 0.0
            for number in range(options.times):
                name = f"{what.replace(' ', '-')}-{number}"
                longest = max(longest, trial(folder, name, fault, length))
                survived += equal(wanted, last(folder, name))
            print(
                f"{what}: {options.times} times, survived {survived}, ended after at most {longest:.1f} s", flush=True
            )


if __name__ == "__main__":
    main()
