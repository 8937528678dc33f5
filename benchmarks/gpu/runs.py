"""What a GPU's runs show: a recipe's best loss, exact resume after SIGKILL, and the tests marked cuda."""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Say = Callable[[dict[str, Any]], None]
ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.cuda.is_available()
SMALL = [
    *("--model.init_args.net.init_args.n_layer", 1, "--model.init_args.net.init_args.n_head", 2),
    *("--model.init_args.net.init_args.n_embd", 32, "--data.init_args.block_size", 32),
    *("--data.init_args.corpus", "python-docs", "--data.init_args.batch_size", 4),
]
STEPS = {"full": 120, "small": 30}
RECIPES = ("shakespeare", "records/shakespeare-gpu")  # the second where there is one


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    """Start `lm fit` in a folder."""
    command = [sys.executable, "-m", "lm", "fit", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, stdout=sys.stderr, text=True)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    """Return a run's metrics so far."""
    path = folder / "logs" / name / "metrics.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def recipe(size: str, seconds: float, say: Say) -> None:
    """Train recipes within the time that is left; say the best loss on the whole validation split, and when."""
    names = [name for name in RECIPES if (ROOT / f"configs/{name}.yaml").exists()]
    for number, name in enumerate(names):
        until = time.monotonic() + (seconds - 15) / len(names[number:]) if number == 0 else time.monotonic() + seconds
        with tempfile.TemporaryDirectory() as place:
            folder, began = Path(place), time.monotonic()
            short = [] if size == "full" else [*SMALL, "--trainer.max_steps", 20, "--trainer.val_check_interval", 10]
            process = start(folder, "--config", ROOT / f"configs/{name}.yaml", "--name", "run", *short)
            try:
                process.wait(until - time.monotonic())
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # at the end of its step
                process.wait()
            found = [row for row in rows(folder, "run") if row.get("val/loss")]
            if not found:
                raise RuntimeError(f"{name}: exit code {process.returncode}, and no evaluation")
            best = min(found, key=lambda row: float(row["val/loss"]))
            speeds = [
                float(row["train/tokens_per_second"])
                for row in rows(folder, "run")
                if row.get("train/tokens_per_second")
            ]
            say({"recipe": name, "best_val_loss": float(best["val/loss"]), "at_step": int(best["step"]),
                 "last_val_loss": float(found[-1]["val/loss"]), "last_step": int(found[-1]["step"]),
                 "tokens_per_second": sorted(speeds)[len(speeds) // 2], "seconds": time.monotonic() - began,
                 "exit_code": process.returncode})  # fmt: skip


def resume(size: str, seconds: float, say: Say) -> None:
    """Compare a run that is killed and resumed with two that are not, bit by bit.

    The second undisturbed run tells what a GPU computes alike: some kernels add in any order, unless the Trainer is
    told to be deterministic.
    """
    kinds: list[tuple[str, str]] = [("bf16-mixed", "true"), ("32-true", "true")]
    kinds += [("16-mixed", "true"), ("bf16-mixed", "null")] if CUDA else []  # a scaler is for GPUs
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda kind: killed(Path(place) / "-".join(kind), size, *kind), kinds):
            say(found)


def killed(folder: Path, size: str, precision: str, deterministic: str) -> dict[str, Any]:
    """Train twice, and a third time with a SIGKILL; return whether all is equal."""
    folder.mkdir()
    steps = STEPS[size]
    words = ["--config", ROOT / "configs/shakespeare.yaml", "--trainer.precision", precision]
    words += ["--trainer.deterministic", deterministic, "--trainer.max_steps", steps, "--trainer.log_every_n_steps", 2]
    words += ["--checkpoint.every_n_steps", steps // 6, "--trainer.val_check_interval", steps]
    words += SMALL if size == "small" else []
    wholes = [start(folder, *words, "--name", name) for name in ("whole", "again")]
    process, last = start(folder, *words, "--name", "killed"), 0
    while process.poll() is None and last < steps // 2:
        time.sleep(0.02)
        last = max((int(row["step"] or 0) for row in rows(folder, "killed")), default=0)
    process.kill()
    was_killed = process.wait() == -signal.SIGKILL  # or it was too fast
    codes = [start(folder, *words, "--name", "killed", "--ckpt_path", "auto").wait(), *(one.wait() for one in wholes)]
    case = {"precision": precision, "deterministic": deterministic == "true", "was_killed": was_killed,
            "killed_after_step": last}  # fmt: skip
    if any(codes):
        return case | {"error": f"exit codes {codes}"}
    whole, again, resumed = (load(folder / f"checkpoints/{name}/last.ckpt") for name in ("whole", "again", "killed"))
    return case | {
        "resumed_equals_whole": same(whole, resumed),
        "again_equals_whole": same(whole, again),
        "largest_difference": max(
            float((whole["state_dict"][key] - value).abs().max()) for key, value in resumed["state_dict"].items()
        ),
        "loss_scale": whole.get("MixedPrecision", {}).get("scale"),
    }


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint."""
    found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two checkpoints have the same weights, optimizer's state, and loss scaler, to the last bit."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return bool(a == b)

    return all(equal(one.get(key), other.get(key)) for key in ("state_dict", "optimizer_states", "MixedPrecision"))


def tests(size: str, seconds: float, say: Say) -> None:
    """Run the tests marked cuda; without a GPU, all are skipped."""
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/training/test_cuda.py", "-p", "no:cacheprovider"]
        words += ["--junitxml", f"{place}/tests.xml", "--basetemp", f"{place}/tests"]
        done = subprocess.run(words, cwd=ROOT, stdout=sys.stderr, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        for line in outcomes(Path(place) / "tests.xml"):
            say(line)
    if done.returncode:
        raise SystemExit(f"pytest: exit code {done.returncode}")


def outcomes(path: Path) -> list[dict[str, Any]]:
    """Return each test's outcome from pytest's report."""
    from xml.etree import ElementTree

    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        bad = next((one for one in case if one.tag in ("failure", "error", "skipped")), None)
        result = "passed" if bad is None else bad.tag
        why = "" if bad is None else str(bad.get("message"))[:300]
        found.append({"test": case.get("name"), "outcome": result, "why": why, "seconds": float(case.get("time") or 0)})
    return found
