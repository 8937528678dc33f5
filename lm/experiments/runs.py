"""A run as its folders tell it: curves, settings, figures, samples; whatever of them is there."""

import fcntl
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lm.errors import UserError
from lm.experiments import tables

HEALTH = ("update_ratio", "dead_units", "saturation")
SAMPLE = b"sample/text_summary"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Run:
    """What is known of a run.

    Args:
        name: Its name.
        logs: Its logs/RUN.
        checkpoints: Its checkpoints/RUN.
    """

    name: str
    logs: Path
    checkpoints: Path
    table: tables.Table = field(default_factory=tables.Table)
    settings: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[int, str]] = field(default_factory=list)
    health: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that is known of."""
        ends = [int(steps[-1]) for steps, _ in self.table.columns.values()]
        return max([*ends, int(self.about.get("step") or 0)])

    @property
    def state(self) -> str:
        """Whether it goes on, is finished, or was stopped."""
        if _locked(self.checkpoints / ".lock"):
            return "goes on"
        wanted = self.settings.get("trainer.max_steps")
        return "finished" if not isinstance(wanted, int) or self.step >= wanted else f"stopped; {wanted:,} were wanted"

    def figures(self) -> dict[str, Any]:
        """Return its figures at the end; those that are not known are left out."""
        table, parameters = self.table, self.about.get("parameters")
        steps, losses = table.curve("val/loss")
        tokens, time = table.last("train/tokens"), tables.seconds(table)[1]
        speeds = sorted(table.curve("train/tokens_per_second")[1])
        best = int(losses.argmin()) if len(losses) else None
        saved = self.about.get("validation") or {}
        drawn = f"{table.rows:,}" + (f", {table.read:,} of them drawn" if table.read < table.rows else "")
        known = {
            "state": self.state,
            "steps": self.step,
            "logged rows": drawn,
            "parameters": parameters,
            "tokens": tokens and int(tokens),
            "FLOPs": 6 * parameters * tokens if parameters and tokens else None,
            "training loss": table.last("train/loss"),
            "validation loss": table.last("val/loss") or saved.get("loss"),
            "best validation loss": None if best is None else float(losses[best]),
            "at step": None if best is None else int(steps[best]),
            "bits per byte": table.last("val/bits_per_byte") or saved.get("bits_per_byte"),
            "seconds of training": float(time[-1]) if len(time) else None,
            "tokens per second": float(speeds[len(speeds) // 2]) if speeds else None,
            "peak memory, MB": self.about.get("peak_memory_mb"),
            "hardware": self.about.get("hardware"),
            "versions": ", ".join(f"{k} {v}" for k, v in (self.about.get("versions") or {}).items()) or None,
            "commit": self.about.get("commit"),
            "command": self.about.get("command"),
        }
        return {name: value for name, value in known.items() if value is not None}


def _locked(path: Path) -> bool:
    """Return whether a process holds a run's lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def folders(said: str) -> tuple[str, Path, Path] | None:
    """Return the name, logs and checkpoints of a run; None where there is none.

    Args:
        said: Its name, or the path of its logs, its checkpoints, or a file in one of them.
    """
    path = Path(said)
    if path.is_file() and (path.name == "metrics.csv" or path.suffix == ".ckpt"):
        path = path.parent
    for place in (path, Path("checkpoints") / said, Path("logs") / said):
        if not place.is_dir() or place.resolve() == Path.cwd():
            continue
        name = place.resolve().name
        kind = place.resolve().parent.name
        logs = _beside(place, "logs") if kind == "checkpoints" else place
        saved = _beside(place, "checkpoints") if kind == "logs" else place
        if (logs / "metrics.csv").exists() or any(logs.glob("config*.yaml")) or any(saved.glob("*.ckpt")):
            return name, logs, saved
    return None


def _beside(path: Path, kind: str) -> Path:
    """Return logs/RUN of checkpoints/RUN, and the other way round."""
    whole = path if path.parent.name and ".." not in path.parts else path.resolve()
    return whole.parent.parent / kind / whole.name


def load(name: str, logs: Path, checkpoints: Path) -> Run:
    """Return what is known of a run."""
    run = Run(name, logs, checkpoints, tables.read(logs / "metrics.csv"))
    if run.table.damaged:
        run.notes.append(f"{logs / 'metrics.csv'}: {run.table.damaged} damaged rows are left out")
    recipe = _recipe(logs)
    with suppress(OSError, ValueError):
        found = json.loads((logs / "run.json").read_bytes())
        run.about = found if isinstance(found, dict) else {}
    if (not recipe or "parameters" not in run.about) and any(checkpoints.glob("*.ckpt")):
        recipe = _ask_checkpoint(run) or recipe
    run.settings = dict(flattened(recipe))
    _read_events(run)
    if not run.table.columns:
        run.notes.append(f"{logs / 'metrics.csv'}: it has no row yet")
    return run


def _recipe(logs: Path) -> dict[str, Any]:
    """Return the recipe of a run's last start that can be read."""

    def number(path: Path) -> int:
        found = re.fullmatch(r"config-(\d+)", path.stem)
        return int(found[1]) if found else 1

    for path in sorted(logs.glob("config*.yaml"), key=number, reverse=True):
        with suppress(OSError, ValueError, yaml.YAMLError):
            recipe = yaml.load(path.read_bytes(), LOADER)
            if isinstance(recipe, dict):
                return recipe
    return {}


def _ask_checkpoint(run: Run) -> dict[str, Any]:
    """Add what the newest checkpoint knows of a run of an earlier release, and return its recipe."""
    from lm.checkpoints import checkpoint  # imports torch, which takes seconds

    newest = next(iter(checkpoint.newest_first(run.checkpoints).values()), None)
    if newest is None:
        run.notes.append(f"{run.checkpoints}: no checkpoint can be read")
        return {}
    run.about = {
        "parameters": sum(tensor.numel() for tensor in newest.weights.values()) or None,
        "versions": newest.versions,
        "validation": newest.validation,
        "step": newest.step,
        **run.about,
    }
    return newest.config or {}


def flattened(recipe: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a recipe's settings under the names by which messages call them: data.batch_size."""
    if isinstance(recipe, dict):
        for key, value in recipe.items():
            if key == "init_args":
                yield from flattened(value, path)
            elif key == "class_path":
                yield path, value
            else:
                yield from flattened(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, recipe


LEFT_OUT = ("name", "trainer.default_root_dir", "trainer.logger", "trainer.callbacks")


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, each with every run's value; what a run lacks is None."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in LEFT_OUT)
    rows = {name: [run.settings.get(name) for run in runs] for name in names}
    known = [i for i, run in enumerate(runs) if run.settings]
    return {name: values for name, values in rows.items() if len({repr(values[i]) for i in known}) > 1}


def _read_events(run: Run) -> None:
    """Add samples and the health of layers, which are in TensorBoard's event files."""
    for path in sorted(run.logs.glob("events.out.tfevents.*")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        for step, value in _values(data):
            kind = value.tag.partition("/")[0]
            if value.tag.encode() == SAMPLE and value.tensor.string_val:
                text = value.tensor.string_val[0].decode(errors="replace")
                run.samples.append((step, re.sub(r"^    ", "", text, flags=re.MULTILINE)))
            elif kind in HEALTH and value.HasField("simple_value") and math.isfinite(value.simple_value):
                run.health.setdefault(value.tag, []).append((step, value.simple_value))


def _values(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the values of the tags that a report shows, each with its step.

    A file has millions of scalars that metrics.csv has too: the few others are found by their tags, and each is read
    from the beginning of its record: a length (uint64), a checksum (uint32), the event.
    """
    places = sorted({*_found(data, SAMPLE), *(at for kind in HEALTH for at in _found(data, f"{kind}/".encode()))})
    if not places:
        return
    from tensorboard.compat.proto.event_pb2 import Event

    end = 0
    for place in places:
        if place < end:  # in the same record
            continue
        for begin in range(max(0, place - 13), max(-1, place - 120), -1):
            (length,) = struct.unpack_from("<Q", data, begin)
            if length > 1 << 24 or not begin + 12 + length > place or data[begin + 12 : begin + 13] != b"\t":
                continue
            with suppress(Exception):  # protobuf's DecodeError: it began elsewhere
                event = Event.FromString(data[begin + 12 : begin + 12 + length])
                end = begin + 12 + length
                yield from ((event.step, value) for value in event.summary.value)
                break


def _found(data: bytes, tag: bytes) -> Iterator[int]:
    at = data.find(tag)
    while at >= 0:
        yield at
        at = data.find(tag, at + len(tag))


def find(said: list[str], *, ready: bool = False) -> tuple[list[Run], list[str]]:
    """Return the runs that are meant, and what of a list is none: files beside runs, as checkpoints/* has them.

    Args:
        said: Names and paths.
        ready: Whether there is something to report without a run.

    Raises:
        UserError: One is not there, or none is a run.
    """
    places, others = {}, []
    for one in said:
        if (place := folders(one)) is not None:
            places[place[1].resolve()] = place
        elif Path(one).exists():
            others.append(one)
        else:
            raise UserError(f"{one}: there is no such run: name one of checkpoints/ or logs/, or a sweep's folder")
    if not places and not ready:
        raise UserError(f"{', '.join(others) or 'nothing'}: no run and no sweep: name folders of checkpoints/ or logs/")
    return _told_apart([load(*place) for place in places.values()]), others


def _told_apart(runs: list[Run]) -> list[Run]:
    """Give runs of one name the paths of their logs as names."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.logs)
    return runs
