"""benchmarks/gpu: what is to run on a GPU runs here, at a small size."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import all as everything
from benchmarks.gpu import speed
from tests.conftest import ROOT

ROWS = {  # what each row of a part has, and how many there are
    "machine": ({"device"}, 3),
    "steps": ({"batch", "compiled", "kernel", "step_ms", "tokens_per_second", "mfu", "peak_gb", "plan_peak_gb"}, 5),
    "by_hand": ({"batch", "compiled", "step_ms", "tokens_per_second", "mfu", "peak_gb", "plan_peak_gb"}, 3),
    "plain": ({"batch", "compiled", "step_ms", "tokens_per_second", "mfu", "peak_gb"}, 2),
    "resume": ({"precision", "resumed_equals_whole", "again_equals_whole", "largest_difference"}, 2),
    "sampling": ({"dtype", "texts", "tokens_per_second"}, 4),
    "recipe": ({"recipe", "best_val_loss", "at_step", "seconds"}, 1),
}


def run(folder: Path, *words: str) -> tuple[int, dict[str, dict[str, object]]]:
    """Run it; return its exit code and what it wrote on the parts."""
    command = [sys.executable, "benchmarks/gpu/all.py", "--size", "small", "--output", str(folder), *words]
    environment = {**os.environ, "LM_DATA_HOME": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads((folder / "all.json").read_text())
    assert list(found["parts"]) == [line[3:].split(":")[0] for line in done.stdout.splitlines() if line[:2] == "=="]
    return done.returncode, found["parts"]


QUICK = ("machine", "steps", "resume", "sampling")  # the others train as these do, and take minutes more


def parts() -> Iterator[Any]:
    """Yield the parts, those that take long with the mark of make test-long."""
    for name in everything.PARTS:
        yield pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.long)


@pytest.mark.parametrize("name", list(parts()))
def test_each_part_measures_here_what_it_will_on_a_gpu(tmp_path: Path, name: str) -> None:
    code, found = run(tmp_path, "--parts", name, "--minutes", "15")
    part = found[name]
    assert code == 0 and part["ok"] and part["error"] == "", (part, (tmp_path / "all.log").read_text()[-2000:])
    if name == "tests":
        assert {row["outcome"] for row in part["rows"]} == {"skipped"} and len(part["rows"]) > 20
        return
    keys, count = ROWS[name]
    assert len(part["rows"]) >= count and all("error" not in row for row in part["rows"])
    assert keys <= set().union(*part["rows"])
    if name == "machine":
        return
    assert all(keys <= row.keys() for row in part["rows"])
    if name == "resume":
        assert all(row["resumed_equals_whole"] and row["again_equals_whole"] for row in part["rows"])
        assert all(row["was_killed"] for row in part["rows"])


def test_a_cards_peak_is_its_data_sheets_or_unknown() -> None:
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert speed.peak_of(name) == 989e12
    assert speed.peak_of("NVIDIA A100-SXM4-80GB") == 312e12 and speed.peak_of("NVIDIA L40S") == 362e12
    for name in ("NVIDIA H100 PCIe", "NVIDIA GeForce GTX 1080", "CPU"):
        assert speed.peak_of(name) is None


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_keeps_no_other_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "benchmarks/gpu"
    broken.mkdir(parents=True)
    (broken / "part.py").write_text(
        "import json, sys, time\n"
        'print(json.dumps({"row": 1}), flush=True)\n'
        'if "plain" in sys.argv: time.sleep(1000)\n'
        'if "steps" in sys.argv: raise MemoryError("none left")\n'
    )
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    report = everything.Report(tmp_path / "out", "small")
    for name, limit in {"steps": 60.0, "plain": 3.0, "sampling": 60.0}.items():
        everything.measure(name, "small", limit, report)
    parts = json.loads(report.path.read_text())["parts"]
    assert {name: (part["ok"], part["error"]) for name, part in parts.items()} == {
        "steps": (False, "MemoryError: none left"),
        "plain": (False, "stopped after 3 s"),
        "sampling": (True, ""),
    }
    assert all(part["rows"] == [{"row": 1}] for part in parts.values())
