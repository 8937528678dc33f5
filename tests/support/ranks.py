"""Runs of several processes."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import yaml

from lm.training.loggers.log_files import read_csv
from tests.conftest import RECIPE, start

NUMBERS = ("train/loss", "train/gradient_norm", "val/loss")


MODULES = ("LanguageModel", "ManualLanguageModel")


def write_recipe(**trainer: Any) -> None:
    recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], **trainer}}
    recipe["data"] = {**RECIPE["data"], "init_args": {**RECIPE["data"]["init_args"], "batch_size": 8}}
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))


def run(name: str, devices: int, *words: object, cwd: Path, fresh: bool = False) -> subprocess.Popen[str]:
    command = ("fit", "--config", "tiny.yaml", "--name", name, "--trainer.devices", devices, *words)
    return start(*command, cwd=cwd, ranks=devices, fresh=fresh)


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def numbers(name: str) -> list[float]:
    """All losses and gradient norms of a run, in order."""
    rows = read_csv(Path("logs") / name / "metrics.csv")[1]
    return [float(row[key]) for row in rows for key in NUMBERS if row.get(key)]


def stop_at(step: int, rank: int, signum: int = signal.SIGTERM, kind: str = "StopAt") -> list[object]:
    arguments = {"step": step, "rank": rank} | ({"signum": int(signum)} if kind == "StopAt" else {})
    return ["--trainer.callbacks+", json.dumps({"class_path": f"tests.support.stop.{kind}", "init_args": arguments})]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
