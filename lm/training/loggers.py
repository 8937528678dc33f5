"""Where metrics go: TensorBoard events and metrics.csv, without gaps or doubled steps across resumes; metrics.prom."""

import csv
import os
import re
import struct
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm.errors import UserError


class Events(TensorBoardLogger):
    """TensorBoard events in one fixed folder.

    Args:
        folder: The run's log folder.
        step: Where training goes on; what an earlier process logged after it is removed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        # purge_step tells a TensorBoard that is watching; what it would hide is cut off by `forget` besides
        purge: dict[str, Any] = {"purge_step": step + 1} if step else {}
        super().__init__(save_dir=str(folder.parent), name=folder.name, version="", default_hp_metric=False, **purge)

    @rank_zero_only
    def save(self) -> None:
        """Flush to the disk; the parent's hparams.yaml would repeat the run's config."""
        if self._experiment is not None:
            self.experiment.flush()


class _File(Logger):
    """One file in the run's log folder.

    Args:
        path: The file; its folder's name is the run's.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Always the same: a run has one such file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved config lies beside it."""


class MetricsCSV(_File):
    """A table of all metrics, one row a step, that a resumed run continues.

    Lightning's CSVLogger deletes the file of the process before it.

    Args:
        folder: The run's log folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "metrics.csv")
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}  # the last one
        self._offset = 0  # where it begins in the file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, or add to the last one where it is of the same step; an unseen metric adds a column."""
        if not self._columns or not metrics.keys() <= set(self._columns):
            self._open([*metrics])
        self._row = (self._row if self._row.get("step") == str(step) else self._next()) | metrics | {"step": str(step)}
        try:
            with self.path.open("r+", newline="") as file:
                file.seek(self._offset)
                file.truncate()
                csv.DictWriter(file, self._columns, restval="").writerow(self._row)
        except OSError:  # half a row on a full disk would spoil the next
            self._row = {}
            os.truncate(self.path, self._offset)
            raise

    def _open(self, metrics: list[str]) -> None:
        """Rewrite the table with columns for these metrics, and stand before its last row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns, rows = read_csv(self.path)
        columns += [name for name in metrics if name not in columns]
        self._columns = []  # where the disk refuses, the next row tries again
        self._row = rows.pop() if rows else {}
        write_csv(self.path, columns, rows)
        self._offset = self.path.stat().st_size
        if self._row:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, columns, restval="").writerow(self._row)
        self._columns = columns

    def _next(self) -> dict[str, Any]:
        self._offset = self.path.stat().st_size
        return {}


class MetricsProm(_File):
    """The newest value of each metric, in metrics.prom, as Prometheus' node exporter reads it (its textfile collector).

    Args:
        folder: The run's log folder; its name is the label `run`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "metrics.prom")
        self._values: dict[str, float] = {}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write all that is known: train/loss as lm_train_loss, the number of finished steps as lm_step."""
        self._values |= {"step": step or 0} | {name: float(value) for name, value in metrics.items()}
        names = {name: "lm_" + re.sub(r"\W", "_", name) for name in self._values}
        rows = [
            f'# TYPE {names[name]} gauge\n{names[name]}{{run="{self.name}"}} {value!r}\n'
            for name, value in self._values.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("".join(rows))
        part.replace(self.path)  # a reader never sees half of it


def read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a table; a file that is missing or empty has the column step and no rows."""
    if not path.exists():
        return ["step"], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows, columns = list(reader), list(reader.fieldnames or ["step"])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not the table that lm wrote ({error}): move it away") from error
    if "step" not in columns:
        raise UserError(f"{path} is not the table that lm wrote (it has no column step): move it away")
    return columns, rows


def write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Write a table in one step: a reader never sees half of it."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def forget(folder: Path, step: int) -> None:
    """Cut from a log folder what was logged after a step, by a process that died after its last checkpoint."""
    table = folder / "metrics.csv"
    columns, rows = read_csv(table)
    kept = [row for row in rows if None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step]
    if len(kept) < len(rows):
        write_csv(table, columns, kept)
    for events in sorted(folder.glob("events.out.tfevents.*")):
        _cut_events(events, step)


def _cut_events(path: Path, step: int) -> None:
    """Truncate an event file before its first event past a step, or before a torn one.

    A record is its length (uint64), a checksum (uint32), the event, and a checksum (uint32).
    """
    from tensorboard.compat.proto.event_pb2 import Event

    data = path.read_bytes()
    end = 0
    while end + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, end)
        stop = end + 12 + length + 4
        if stop > len(data):
            break
        event = Event.FromString(data[end + 12 : stop - 4])
        if event.step > step and not event.HasField("session_log"):  # the log of this start says where it begins
            break
        end = stop
    if end < len(data):
        os.truncate(path, end)
