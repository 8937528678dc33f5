"""TensorBoard events: one writer that follows its file, and what an earlier process left."""

import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lm import storage
from lm.training.loggers.removed import Removed, is_file

VERSION = b"brain.Event:"  # in the first record of every event file
SUFFIX = ".lm"  # of lm's event files
_EARLIER = (b"train/loss_step", b"train/skipped", b"train/loss$", b"val/bits_per_byte")  # in those of earlier releases


class Events(TensorBoardLogger):
    """TensorBoard events in one fixed folder.

    Args:
        folder: The run's log folder.
        step: The step that training resumes from; what an earlier process logged after it is removed.
        opened: Whether anything may be written yet: a start that is refused leaves no file.
        removed: Called with a file that somebody removed.
    """

    def __init__(self, folder: Path, step: int = 0, *, opened: bool = True, removed: Removed | None = None) -> None:
        # purge_step makes a running TensorBoard hide later steps; `forget` also cuts them off the files
        purge: dict[str, Any] = {"purge_step": step + 1} if step else {}
        place: dict[str, Any] = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
        super().__init__(**place, default_hp_metric=False, filename_suffix=SUFFIX, **purge)
        self.opened, self._removed = opened, removed or Removed()
        self._file: tuple[Path, bytes] | None = None  # and its first bytes, which hold its creation time

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The SummaryWriter: a new one where its file was removed, as the old one would write to a deleted file."""
        if not self.opened:
            return DummyLogger().experiment
        if self._experiment is not None and self._file and _head(self._file[0]) != self._file[1]:
            self._removed(self._file[0])
            writers: Any = self._experiment.all_writers  # what is there now is not ours
            for writer in writers.values():
                writer.event_writer._general_file_writer.filename = os.devnull
            with suppress(OSError):
                self._experiment.close()
            self._experiment = None
            self._kwargs.pop("purge_step", None)
        if self._experiment is None:
            before = {*event_files(Path(self.log_dir))}
            _ = super().experiment
            made = {*event_files(Path(self.log_dir))} - before
            self._file = next(((path, _head(path)) for path in made), None)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics, and wait until they are in the file."""
        super().log_metrics(metrics, step)
        self.experiment.flush()  # the writer's thread would append them, by name, to what may be another's file by then

    @rank_zero_only
    def save(self) -> None:
        """Flush all to the disk; the parent's hparams.yaml is left out, as it would repeat the run's config."""
        if self._experiment is not None:
            self.experiment.flush()
            if self._file:
                storage.flush(self._file[0])
                storage.flush(self._file[0].parent)


def _head(path: Path) -> bytes:
    """Return the first bytes of a file; none where it is not a regular file."""
    with suppress(OSError):
        if is_file(path):
            with path.open("rb") as file:
                return file.read(64)
    return b""


def event_files(folder: Path) -> list[Path]:
    """Return a folder's event files, whoever wrote them."""
    return sorted(folder.glob("events.out.tfevents.*"))


def own_events(folder: Path) -> list[Path]:
    """Return the event files that lm wrote: by their suffix, those of earlier releases by their tags."""
    return [path for path in event_files(folder) if is_file(path) and _is_own(path)]


def _is_own(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(100)
        if VERSION not in head or path.name.endswith(SUFFIX):
            return VERSION in head
        data = head + file.read()
    return any(tag in data for tag in _EARLIER)


def end_of(path: Path, step: int) -> int:
    """Return where an event file's first event past a step begins, or a torn one.

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
        try:
            event = Event.FromString(data[end + 12 : stop - 4])
        except Exception:  # protobuf's DecodeError, which has no type stubs
            break
        if event.step > step and not event.HasField("session_log"):  # this start's session_log marks where it begins
            break
        end = stop
    return end
