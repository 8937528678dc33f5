"""Runs that are stopped and compared."""

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lm.checkpoints import checkpoint
from lm.training.loggers.log_files import read_csv

TIMES = ("tokens_per_second",)  # the one metric that may differ


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare nested checkpoints, tensors by their bits."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in TIMES:
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def state(path: Path) -> dict[str, Any]:
    """What must be equal of a checkpoint: all but who wrote it and under which name."""
    saved = checkpoint.load(path)
    del saved["start"], saved["loops"]
    for key in ("name", "trainer", "checkpoint"):
        del saved["lm"]["config"][key]
    return saved


def table(run: str) -> list[dict[str, str]]:
    rows = read_csv(Path("logs") / run / "metrics.csv")[1]
    return [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


def events(run: str) -> list[tuple[int, str, float]]:
    """All scalars in the event files themselves, whatever a reader would hide."""
    found = []
    for path in sorted((Path("logs") / run).glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            found += [(event.step, v.tag, v.tensor.float_val[0]) for v in event.summary.value if v.tensor.float_val]
    return sorted(item for item in found if not item[1].endswith(TIMES))


def assert_runs_equal(a: str, b: str) -> None:
    assert_equal(state(Path("checkpoints") / a / "last.ckpt"), state(Path("checkpoints") / b / "last.ckpt"))
    assert_equal(state(Path("checkpoints") / a / "best.ckpt"), state(Path("checkpoints") / b / "best.ckpt"))
    assert table(a) == table(b)
    assert events(a) == events(b)
    steps = [int(row["step"]) for row in table(a)]
    assert steps == sorted(set(steps))


def stop_with(callback: str, step: int) -> list[str]:
    return ["--trainer.callbacks+", f"tests.support.stop.{callback}", f"--trainer.callbacks.step={step}"]
