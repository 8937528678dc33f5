"""Benchmarks that can be cut short still run: each prints its table, with a figure in each row."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CASES = {
    "overhead": "overhead --config configs/quickstart.yaml --steps 4 --rounds 1",
    "overhead, several steps a call": "overhead --config configs/names/mlp.yaml --steps 400 --rounds 1",
    "manual": "manual --rounds 1 --only eager --case MLP",
    "dense": "dense --length 8 --rounds 1",
    "startup": "startup --rounds 1",
    "sweep": "sweep --trials 2 --steps 20",
    "widths": "widths --steps 4 --widths 64 --rates 0.004 0.008",
    "dtypes": "dtypes --config configs/quickstart.yaml --steps 2",
    "finetune": "finetune --first 2 --steps 2",
    "calculator": "calculator --seeds 1 --part 0.002",
    "rewards": "posttraining rewards --seeds 1 --part 0.03",
    "preferences": "posttraining preferences --seeds 1 --part 0.02",
}
LONG = {
    "records": "records --only 'shakespeare-cpu, 220 steps' --seeds 1",
    "conversations": "posttraining sft --seeds 1 --part 0.003",
    "optimism": "posttraining optimism --seeds 1 --part 0.02",
}
PARAMETERS = [pytest.param(words, id=name, marks=pytest.mark.slow) for name, words in CASES.items()] + [
    pytest.param(words, id=name, marks=pytest.mark.long) for name, words in LONG.items()
]


@pytest.mark.parametrize("command", PARAMETERS)
def test_it_prints_its_table(command: str, tmp_path: Path, reference: Path) -> None:
    script, *words = shlex.split(command)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LM_DATA_HOME": str(reference)}
    program = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *words]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    lines = [i for i, line in enumerate(table) if "---" in line]  # each below the names of a table's columns
    rows = [line for i, line in enumerate(table) if not {i, i + 1} & {*lines}]
    assert lines and rows and all(re.search(r"\d", row) for row in rows), table
