"""Where metrics go: metrics.csv and metrics.prom; and that no step is missing or doubled in a log after a resume."""

import csv
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily

from lm import storage
from lm.errors import UserError
from lm.training.loggers.events import end_of, own_events
from lm.training.loggers.removed import Removed, is_file

_STEP = re.compile(rb'^lm_step\{run="', re.MULTILINE)  # in metrics.prom


class _File(Logger):
    """One file in the run's log folder.

    Args:
        path: The file; its folder's name is the run's.
        removed: Called where somebody removed it.
    """

    def __init__(self, path: Path, removed: Removed | None) -> None:
        super().__init__()
        self.path, self._removed = path, removed or Removed()

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
    """A table of all metrics, one row per step, that a resumed run continues.

    Lightning's CSVLogger deletes the file of an earlier process.

    Args:
        folder: The run's log folder.
        removed: Called where somebody removed the table.
    """

    def __init__(self, folder: Path, removed: Removed | None = None) -> None:
        super().__init__(folder / "metrics.csv", removed)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []  # the last one, which may still grow, and those the disk refused
        self._offset = 0  # where the first of them begins in the file
        self._tail = b""  # what was written from there on
        self._sum = hashlib.sha256()  # of what was written before
        self._file: os.stat_result | None = None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, or add to the last one where it is of the same step; an unseen metric adds a column.

        A row that the disk refuses is kept, and tried again with the next.
        """
        if not (self._rows and self._rows[-1]["step"] == str(step)):
            self._rows.append({"step": str(step)})
        self._rows[-1] |= metrics
        self._write()

    @rank_zero_only
    def save(self) -> None:
        """Wait until all rows are on the disk."""
        if self._rows:
            self._write()
            storage.flush(self.path)
            storage.flush(self.path.parent)

    def _is_there(self) -> bool:
        """Return whether the table is still there, byte for byte as it was written.

        Raises:
            UserError: Something else is there, which must not be changed.
        """
        if not os.path.lexists(self.path):
            return False
        if self._file is not None and _unchanged(self.path, self._file):
            return True
        data = self.path.read_bytes() if is_file(self.path) else b""
        if data[self._offset :] != self._tail or hashlib.sha256(data[: self._offset]).digest() != self._sum.digest():
            raise UserError(f"{self.path} is not the table that lm wrote: it is left alone, move it away")
        self._file = self.path.stat()  # an editor rewrote it as it was, or it was touched
        return True

    def _write(self) -> None:
        """Write the rows that the file may still lack."""
        if self._columns and not self._is_there():
            self._removed(self.path)
            self._columns = []
        if not {name for row in self._rows for name in row} <= set(self._columns):
            self._add_columns()
        text = [_line(row, self._columns) for row in self._rows]
        if text == [self._tail]:
            return
        opened = False
        try:
            with self.path.open("r+b") as file:
                opened = True
                file.seek(self._offset)
                file.truncate()
                self._tail = b""
                file.write(b"".join(text))
            self._tail = text[-1]
        except OSError:
            if opened:  # half a row would spoil the next
                with suppress(OSError):
                    os.truncate(self.path, self._offset)
            raise
        finally:
            with suppress(OSError):
                self._file = self.path.stat()
        self._sum.update(b"".join(text[:-1]))
        self._offset += sum(map(len, text[:-1]))
        self._rows = self._rows[-1:]

    def _add_columns(self) -> None:
        """Rewrite the table with columns for all pending rows; an earlier process may have begun the first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns, rows = read_csv(self.path)
        if rows and rows[-1]["step"] == self._rows[0]["step"]:
            self._rows[0] = rows.pop() | self._rows[0]
        columns = [*dict.fromkeys([*columns, *(name for row in self._rows for name in row)])]
        data = write_csv(self.path, columns, rows)
        self._columns, self._file = columns, self.path.stat()
        self._offset, self._tail, self._sum = len(data), b"", hashlib.sha256(data)


class MetricsProm(_File):
    """The newest value of each metric, in metrics.prom, as Prometheus' node exporter reads it (its textfile collector).

    Args:
        folder: The run's log folder; its name is the label `run`.
        removed: Called where somebody removed it.
    """

    def __init__(self, folder: Path, removed: Removed | None = None) -> None:
        super().__init__(folder / "metrics.prom", removed)
        self._values: dict[str, float] = {}
        self._written: bytes | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield all known values, as prometheus_client asks for them: train/loss as lm_train_loss."""
        for name, value in self._values.items():
            gauge = GaugeMetricFamily(f"lm_{name}", "the newest value", labels=["run"])
            gauge.add_metric([self.name], value)
            yield gauge

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write all known values, and the number of finished steps as lm_step."""
        for name, value in ({"step": step or 0} | metrics).items():
            self._values[re.sub(r"\W", "_", name, flags=re.ASCII)] = float(value)
        if self._written and not os.path.lexists(self.path):
            self._removed(self.path)
        elif self._written and not (is_file(self.path) and self.path.read_bytes() == self._written):
            raise UserError(f"{self.path} is not what lm wrote: it is left alone, move it away")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = generate_latest(self)
        with storage.whole(self.path, flushed=False) as file:  # the next step replaces it: not worth waiting for
            file.write(data)
        self._written = data


def check(folder: Path) -> None:
    """Check that no other program's file is in the place of what lm writes to a log folder.

    Raises:
        UserError: One is.
    """
    _own_table(folder)
    path = folder / "metrics.prom"
    if os.path.lexists(path) and not (is_file(path) and (not (data := path.read_bytes()) or _STEP.search(data))):
        raise UserError(f"{path} was not written by lm: move it away")


def _own_table(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a log folder's table, after checking that it is of lm's metrics."""
    path = folder / "metrics.csv"
    columns, rows = read_csv(path)
    if (len(columns) > 1 or rows) and not any(str(name).startswith(("train/", "val/")) for name in columns):
        raise UserError(f"{path} is not the table that lm wrote (it has no train/ or val/ column): move it away")
    return columns, rows


def read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a table; a file that is missing or empty has the column step and no rows.

    Raises:
        UserError: It is not the table that lm writes, whose first column is the step.
    """
    if not os.path.lexists(path):
        return ["step"], []
    if not is_file(path):
        raise UserError(f"{path} is not the table that lm wrote (it is no file): move it away")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows, columns = list(reader), list(reader.fieldnames or ["step"])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not the table that lm wrote ({error}): move it away") from error
    if columns[0] != "step":
        raise UserError(f"{path} is not the table that lm wrote (its first column is not step): move it away")
    return columns, rows


def _line(row: dict[str, Any], columns: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="").writerow(row)
    return text.getvalue().encode()


def write_csv(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    """Write a table, whole or not at all, and return its bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    storage.write_whole(path, data)
    return data


def _unchanged(path: Path, stat: os.stat_result) -> bool:
    """Return whether a file is the same one as before, and nothing was written to it since."""
    with suppress(OSError):
        now = path.lstat()
        return os.path.samestat(now, stat) and (now.st_size, now.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    return False


def forget(folder: Path, step: int) -> Path | None:
    """Remove from a log folder what was logged after a step, by a process that died after its last checkpoint.

    A run that starts anew takes nothing away: what an earlier one has logged is moved to a folder in it.

    Returns:
        That folder; None where nothing was moved.
    """
    table = folder / "metrics.csv"
    columns, rows = _own_table(folder)
    kept = [row for row in rows if None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step]
    ends = {path: end for path in own_events(folder) if (end := end_of(path, step)) < path.stat().st_size}
    if not step and (len(kept) < len(rows) or ends):
        names = (folder / f"earlier-{number}" for number in itertools.count(1))
        aside = next(path for path in names if not os.path.lexists(path))
        aside.mkdir()
        for path in (table, folder / "metrics.prom", *own_events(folder)):
            if path.exists():
                path.rename(aside / path.name)
        return aside
    if len(kept) < len(rows):
        write_csv(table, columns, kept)
    for path, end in ends.items():
        os.truncate(path, end)
    return None
