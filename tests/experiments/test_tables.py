from pathlib import Path

import numpy as np
import pytest

from lm.experiments import tables


def table(tmp_path: Path, text: str) -> tables.Table:
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode())
    return tables.read(path)


def test_a_table_is_read(tmp_path: Path) -> None:
    found = table(tmp_path, "step,train/loss,val/loss\r\n1,4.5,\r\n2,4.25,4.75\r\n3,4,\r\n")
    assert found.curve("train/loss")[0].tolist() == [1, 2, 3] and found.curve("train/loss")[1].tolist() == [
        4.5,
        4.25,
        4,
    ]
    assert (found.curve("val/loss")[0].tolist(), found.last("val/loss")) == ([2], 4.75)
    assert (found.rows, found.read, found.damaged) == (3, 3, 0)
    assert found.last("nothing") is None


@pytest.mark.parametrize(
    ("spoiled", "damaged"),
    [
        ("2,4.2", 1),
        ("2,x,\r\n", 1),
        ("2,1,1,1\r\n", 1),
        ("\0\0\0\r\n", 1),
        ("-1,3,\r\n", 1),
        ("2,nan,inf\r\n", 0),
        ("", 0),
    ],
)
def test_damaged_rows_are_counted_and_left_out(tmp_path: Path, spoiled: str, damaged: int) -> None:
    found = table(tmp_path, f"step,train/loss,val/loss\r\n1,4.5,\r\n{spoiled}")
    assert found.damaged == damaged and found.curve("train/loss")[1].tolist() == [4.5]


@pytest.mark.parametrize("text", ["", "\n", "a,b\n1,2\n", "step", "step\n1\n", "\ufeffstep,train/loss\n1,2\n"])
def test_odd_tables(tmp_path: Path, text: str) -> None:
    found = table(tmp_path, text)
    assert list(found.columns) == (["train/loss"] if "step,t" in text else [])


def test_of_a_step_that_is_there_twice_the_later_row_counts(tmp_path: Path) -> None:
    steps, values = table(tmp_path, "step,train/loss\n1,9\n2,8\n1,7\n").curve("train/loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [7, 8])


def test_of_a_long_table_all_evaluations_and_the_last_row_are_read(tmp_path: Path) -> None:
    rows = [f"{i},{i / 2},{i if i % 1009 == 0 else ''}\r\n" for i in range(1, 50_001)]
    found = table(tmp_path, "step,train/loss,val/loss\r\n" + "".join(rows))
    assert found.rows == 50_000 and found.read < 5_000
    assert found.curve("val/loss")[0].tolist() == list(range(1009, 50_001, 1009))
    assert found.curve("train/loss")[0][-1] == 50_000


def test_smoothed_is_the_mean_of_each_interval() -> None:
    steps = np.arange(1, 1001, dtype=float)
    ends, means = tables.smoothed(steps, steps**2, points=10)
    assert len(ends) == 10 and ends[-1] == 1000
    assert means[0] == np.mean(steps[steps <= ends[0]] ** 2)
    assert means[-1] == np.mean(steps[steps > ends[-2]] ** 2)
    assert tables.smoothed(steps[:5], steps[:5])[1].tolist() == [1, 2, 3, 4, 5]


def test_time_is_tokens_over_throughput(tmp_path: Path) -> None:
    head = "step,train/tokens,train/tokens_per_second\n"
    found = table(tmp_path, head + "10,1000,100\n20,2000,200\n30,3000,50\n")
    assert tables.seconds(found)[1].tolist() == [10, 15, 35]
    assert tables.at_steps(tables.seconds(found), np.array([5.0, 25.0])) == [5, 25]
