"""The drawing of a run's losses."""

from pathlib import Path

import pytest

from lm.training.loggers.curve import HEIGHT, WIDTH, drawing


def test_points_are_where_their_numbers_are() -> None:
    rows = [{"step": str(10 * i), "train/loss": str(4 - i), "val/loss": ""} for i in range(4)]
    rows.append({"step": "30", "train/loss": "nan", "val/loss": "4"})
    lines = drawing(rows)
    grid = [line.partition("|")[2].ljust(WIDTH) for line in lines[:HEIGHT]]
    assert grid[0][0] == "·" and grid[-1][-1] == "·" and grid[0][-1] == "o"
    assert sum(line.count("·") for line in grid) == 4
    assert lines[0].startswith("4.000 |") and lines[HEIGHT - 1].startswith("1.000 |")
    assert lines[HEIGHT + 1].split() == ["0", "step", "30"]
    assert drawing([]) == [] and len(drawing([{"step": "1", "train/loss": "2.0"}])) == HEIGHT + 3


@pytest.mark.slow
def test_fit_draws_it_where_it_is_asked_to(lm, workplace: Path) -> None:
    words = ["fit", "--config", "tiny.yaml"]
    code, out, err = lm(*words, "--name", "drawn", "--plot")
    assert code == 0, err
    assert "· train/loss, o val/loss" in out and out.splitlines()[-1].startswith("done: ")
    assert "plot" not in Path("logs/drawn/config.yaml").read_text()
    assert "train/loss, o" not in lm(*words, "--name", "plain")[1]
