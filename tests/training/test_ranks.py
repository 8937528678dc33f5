"""Several processes over gloo, started by plain `lm fit`: the same run however it is divided, stopped or resumed."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.training.loggers import read_csv
from tests.conftest import RECIPE, start
from tests.training.test_resume import assert_equal, state

NUMBERS = ("train/loss", "train/gradient_norm", "val/loss")
MODULES = ("LanguageModel", "ManualLanguageModel")


def write_recipe(**trainer: Any) -> None:
    recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], **trainer}}
    recipe["data"] = {**RECIPE["data"], "init_args": {**RECIPE["data"]["init_args"], "batch_size": 8}}
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))


def run(name: str, devices: int, *words: object, cwd: Path) -> subprocess.Popen[str]:
    command = ("fit", "--config", "tiny.yaml", "--name", name, "--trainer.devices", devices, *words)
    return start(*command, cwd=cwd)


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def numbers(name: str) -> list[float]:
    """All losses and gradient norms of a run, in order."""
    rows = read_csv(Path("logs") / name / "metrics.csv")[1]
    return [float(row[key]) for row in rows for key in NUMBERS if row.get(key)]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_division_changes_nothing(workplace: Path, module: str) -> None:
    write_recipe(precision="64-true", max_steps=100, val_check_interval=50)
    net = ("--model", f"lm.training.{module}", "--model.init_args.net.init_args.dropout", 0)
    for devices, accumulate in ((1, 1), (1, 4), (2, 2), (4, 1)):
        words = (*net, "--trainer.accumulate_grad_batches", accumulate)
        finish(run(f"{devices}x{accumulate}", devices, *words, cwd=workplace))
    whole = numbers("1x1")
    assert len(whole) >= 102
    for divided in ("1x4", "2x2", "4x1"):
        assert numbers(divided) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("module", MODULES)
def test_two_ranks_resume_to_the_last_bit_and_one_goes_on(workplace: Path, module: str) -> None:
    write_recipe(precision="64-true")
    words = ("--model", f"lm.training.{module}")
    finish(run("whole", 2, *words, cwd=workplace))
    middle = ("--ckpt_path", "checkpoints/whole/step=0000005.ckpt")
    finish(run("parts", 2, *words, *middle, cwd=workplace))
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
    assert len(numbers("parts")) >= 14
    finish(run("alone", 1, *words, *middle, "--model.init_args.net.init_args.dropout", 0, cwd=workplace))
    finish(run("both", 2, *words, *middle, "--model.init_args.net.init_args.dropout", 0, cwd=workplace))
    assert numbers("alone") == pytest.approx(numbers("both"), rel=1e-10)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_at_one_step(workplace: Path, rank: int) -> None:
    write_recipe(max_steps=400, val_check_interval=200)
    finish(run("whole", 2, cwd=workplace))
    process = run("parts", 2, "--ckpt_path", "auto", cwd=workplace)
    while not Path("checkpoints/parts/last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill([process.pid, *children(process.pid)][rank], signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    finish(run("parts", 2, "--ckpt_path", "auto", cwd=workplace))
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
