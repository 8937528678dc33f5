"""Sharded checkpoints on the disk: a folder that is written whole or not at all, and read without running code."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from lm import storage
from lm.checkpoints import disk, owned
from lm.errors import UserError, described

META, SUMS = "lm.pt", "checksums.json"


@contextmanager
def replacing(path: Path, group: distributed.ProcessGroup) -> Iterator[Path]:
    """Give all ranks of a group a new folder beside path to write in; complete and flushed, it takes path's place.

    Raises:
        UserError: A rank could not write; path is unchanged.
    """
    part = path.with_name(f".{path.name}.new.part")
    first = distributed.get_rank() == 0
    problems: list[str | None] = [None] * distributed.get_world_size()

    @contextmanager
    def together() -> Iterator[None]:
        """Wait until all ranks have done something, and share the errors of those that failed."""
        problem = next(filter(None, problems), None)
        try:
            yield
        except (OSError, RuntimeError, UserError, _of_ranks()) as error:
            problem = problem or _told(path, error)
        distributed.all_gather_object(problems, problem, group)

    with together():
        if first:
            owned.check(path)
            owned.remove(part)
            part.mkdir(parents=True)
    with together():
        yield part
    with together():
        if first and not any(problems):
            _seal(part)
            owned.take_place(part, path)
    if found := next(filter(None, problems), None):
        if first:
            with suppress(OSError, UserError):  # the first error is the one to report
                owned.remove(part)
        raise UserError(found)


def _of_ranks() -> Any:
    """Return torch's exception that has the errors of all ranks; importing it takes nearly half a second."""
    from torch.distributed.checkpoint.api import CheckpointException

    return CheckpointException


def _told(path: Path, error: BaseException) -> str:
    if isinstance(error, _of_ranks()):
        error = next((one for one, _ in error.failures.values()), error)
    return str(error if isinstance(error, UserError) else disk.refusal(path, error))


def _seal(folder: Path) -> None:
    sums = {file.name: crc32(file) for file in sorted(folder.iterdir())}
    with (folder / SUMS).open("w") as stream:
        json.dump(sums, stream)
        stream.flush()
        os.fsync(stream.fileno())
    storage.flush(folder)


def unfinished(folder: Path) -> list[Path]:
    """Return the unfinished checkpoints in a folder: of processes that were killed, and of those that still write."""
    return [*folder.glob(".*.ckpt.new.part"), *folder.glob(".*.ckpt.old.part")]


def recover(folder: Path) -> None:
    """Finish what a process killed between two renames began. No other process may be using the folder."""
    for part in unfinished(folder):
        path = folder / part.name.removeprefix(".").removesuffix(".new.part").removesuffix(".old.part")
        if not os.path.lexists(path) and (damage(part) is None if part.is_dir() else owned.is_ours(part)):
            part.rename(path)
            storage.flush(folder)


def copy(source: Path, target: Path) -> None:
    """Copy a sharded checkpoint by hard-linking its files, which never change."""
    part = target.with_name(f".{target.name}.copy.part")
    owned.remove(part)
    try:
        try:
            shutil.copytree(source, part, copy_function=os.link)
        except OSError:  # a file system without links
            owned.remove(part)
            shutil.copytree(source, part)
        owned.take_place(part, target)
    except (OSError, UserError):
        with suppress(OSError, UserError):
            owned.remove(part)
        raise


def crc32(file: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with storage.plain(file).open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def holds(path: Path) -> bool:
    """Return whether a file is a part of a sharded checkpoint."""
    return path.is_file() and (path.parent / SUMS).is_file()


def damage(path: Path) -> str | None:
    """Return what is wrong with a sharded checkpoint, or None where it is whole. Reads all of it."""
    try:
        sums = json.loads(storage.plain(path / SUMS).read_text())
        wrong = next((name for name, value in sums.items() if crc32(path / name) != value), None)
    except (OSError, ValueError, AttributeError) as error:
        return f"it is not whole or no checkpoint ({error})"
    if wrong or not {META, ".metadata"} <= sums.keys():
        return f"its file {wrong or META} does not match its checksum"
    from lm.checkpoints import sharded_tensors

    try:
        sharded_tensors.shapes(sharded_tensors.Reader(path))
    except Exception as error:  # another program's can raise anything
        return f"its index cannot be read ({described(error)})"
    return None


def meta(path: Path) -> dict[str, Any]:
    """Return everything in a sharded checkpoint except its tensors."""
    rest: dict[str, Any] = torch.load(storage.plain(path / META), map_location="cpu", weights_only=True)
    return rest


def load_whole(path: Path) -> dict[str, Any]:
    """Return a sharded checkpoint as if it had been a single file: whole tensors, optimizer state by number."""
    from lm.checkpoints import sharded_tensors

    flat = sharded_tensors.load(path)
    checkpoint = meta(path)
    groups = checkpoint.pop("param_groups")
    names = [name for group in groups for name in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for number, name in enumerate(names):
        prefix = f"optimizer.{name}."
        states[number] = {key.removeprefix(prefix): flat[key] for key in flat if key.startswith(prefix)}
    count = iter(range(len(names)))
    numbered = [{**group, "params": [next(count) for _ in group["params"]]} for group in groups]
    weights = {k.removeprefix("state_dict."): v for k, v in flat.items() if k.startswith("state_dict.")}
    return checkpoint | {"state_dict": weights, "optimizer_states": [{"state": states, "param_groups": numbered}]}
