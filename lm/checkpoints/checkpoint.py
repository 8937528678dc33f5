"""Checkpoint files: written so that no crash can tear them, read so that no damage goes unseen.

A file is a torch.save archive of tensors and plain values, and loads with weights_only=True. Every record of the
archive carries a CRC-32, which `damage` checks.
"""

import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp

from lm import outputs, storage
from lm.checkpoints import disk, owned, schema, sharded
from lm.checkpoints.background import Writer
from lm.errors import UserError, described
from lm.training import harmless

NET = "net."
"""What the names of a network's weights begin with in a checkpoint."""
FOREIGN = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What is raised where a checkpoint lacks something, or has it of another type."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, flushes to the disk, renames.

    Lightning's own stages in $TMPDIR and moves the file from there, which is a plain copy where the run folder is
    another device, a mounted volume say, and never flushes it; and where the folder is not writable, it returns as if
    all were well (Lightning issues 19970, 21253, 21800; the latter still so in 2.6.6).

    Args:
        whole: A checkpoint that `resolve` has just found whole. It is read while the network is made, and its checksums
            are not computed again.
    """

    def __init__(self, whole: Path | None = None) -> None:
        self.writer, self.whole = Writer(), whole
        self._state: dict[str, Any] | None = None  # what was saved last; not of a sharded one
        self._folders: set[Path] = set()  # in which something was written
        self.restoring: Path | None = None  # what is read, until a step has been made with it
        self._ahead: Future[dict[str, Any]] | None = None
        if whole and whole.is_file():
            pool = ThreadPoolExecutor(1)
            self._ahead = pool.submit(load, whole, verified=True)
            pool.shutdown(wait=False)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy a checkpoint's state, and write it in the background, whole or not at all.

        Raises:
            UserError: The disk refused the one before; of this one, `writer.check` and `writer.wait` raise it.
        """
        self.writer.wait()
        self._state = self.writer.snapshot(checkpoint)
        self.writer.submit(partial(self._write, Path(path)))

    def copy(self, source: Path, target: Path) -> None:
        """Copy the checkpoint that was saved last, in the background, once it is written; not over what is foreign."""
        self.writer.submit(partial(self._copy, source, target))

    def _write(self, path: Path) -> None:
        """Write the state that was saved last, once more where somebody removes the folder meanwhile."""
        self.see(path.parent)
        try:
            write(self._state, path)
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self.see(path.parent)
            write(self._state, path)

    def _copy(self, source: Path, target: Path) -> None:
        if owned.is_foreign(target):  # it came while the first was written
            harmless.note_once(self, f"note: {target} was not written by lm: it is left alone, {source} is whole")
            return
        self.see(target.parent)
        try:
            copy(source, target)
        except (FileNotFoundError, UserError):
            if source.exists():
                raise
            if self._state is not None:  # of a sharded one, the next save makes it again
                self._write(target)

    def see(self, folder: Path) -> None:
        """Say, once, that a folder was removed in which a checkpoint was written before."""
        if folder in self._folders and not folder.is_dir():
            text = f"note: {folder} was removed while training went on: it is made again, earlier checkpoints are lost"
            harmless.note_once(self, text)
        self._folders.add(folder)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, rank 0's choice; raises UserError where it is missing, damaged or not one of ours."""
        if distributed.is_initialized():  # another rank may have seen other files, a moment before or after
            choice = [str(path)]
            distributed.broadcast_object_list(choice, src=0)
            (path,) = choice
        self.restoring = Path(path)
        if self._ahead and Path(path) == self.whole:
            ahead, self._ahead = self._ahead, None
            return ahead.result()
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        owned.remove(Path(path))


def write(checkpoint: dict[str, Any] | None, path: Path) -> None:
    """Write a checkpoint, whole or not at all; raises UserError where the disk refuses."""
    with replacing(path) as file:
        torch.save(checkpoint, file)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside path; on success it is flushed to the disk and takes path's place.

    Raises:
        UserError: The disk is full, the folder refuses, or lm did not write what is there; path is as it was.
    """
    try:
        owned.check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.whole(path, owned.take_place) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch's archive writer turns a full disk into a RuntimeError
        raise disk.refusal(path, error) from error


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, whole or not at all. A copy, not a link: damage to one must not be damage to both.

    Of a folder, whose size may be that of many disks' worth, the files are linked where that is possible.
    """
    if source.is_dir():
        sharded.copy(source, target)
        return
    with replacing(target) as file:
        shutil.copyfile(source, file.name)  # within the kernel, where it can


def clear(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left. No other may be at work in the folder."""
    probes = [path for path in folder.glob(".probe.*") if re.fullmatch(r"\.probe\.[0-9a-f]+", path.name)]
    for part in (*storage.parts(folder, r".*\.ckpt"), *probes):
        if owned.is_ours(part):
            part.unlink()
    for part in (*sharded.unfinished(folder), *folder.glob(".*.ckpt.copy.part")):
        owned.remove(part)


def renew_last(folder: Path, newest: Path | None) -> None:
    """Make last.ckpt the newest whole checkpoint again, where it was damaged, or not yet written when a run ended."""
    last = folder / "last.ckpt"
    if newest not in (None, last):
        copy(newest, last)


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None where it is whole.

    Reads all of it: a bit flipped anywhere in the records is found by their checksums.
    """
    if path.is_dir():
        return sharded.damage(path) or _foreign(path)
    if path.is_symlink() and not path.exists():
        return f"it is {outputs.kind(path)}"
    if sharded.holds(path):
        return f"it is a part of the sharded checkpoint {path.parent}: say the folder"
    if path.exists() and not path.is_file():
        return f"it is {outputs.kind(path)}, no file"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch writes none of these; a flipped bit there makes it read a record as something else
            odd = [i.filename for i in archive.infolist() if i.compress_type or i.flag_bits & 1 or i.external_attr]
            torn = odd[0] if odd else _torn(archive)
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:  # a damaged archive can raise anything
        return f"it is truncated or not a checkpoint ({error})"
    if torn:
        return f"its record {torn} does not match its checksum"
    return _foreign(path)


def _foreign(path: Path) -> str | None:
    """Return what keeps a whole file from being a checkpoint of lm's, or None."""
    try:
        peek(path)
    except Exception as error:
        return f"it is no checkpoint of lm ({described(error)})"
    return None


def _torn(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the first record whose checksum is wrong, as testzip does, but on all cores."""

    def check(record: zipfile.ZipInfo) -> str | None:
        try:
            with archive.open(record) as stream:
                while stream.read(1 << 20):
                    pass
        except zipfile.BadZipFile:
            return record.filename
        return None

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(check, archive.infolist())), None)


def peek(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, with its "step" and "start"; the tensors stay on the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of foreign files
        checkpoint = (
            sharded.meta(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
    outline = {key: value for key, value in schema.USED.items() if key != "state_dict" or not path.is_dir()}
    if problem := schema.problem(checkpoint, outline):
        raise ValueError(problem)
    return checkpoint["lm"] | {"step": checkpoint["global_step"], "start": int(checkpoint.get("start", 0))}


def load(path: Path, verified: bool = False) -> dict[str, Any]:
    """Return a checkpoint, verified to be whole, on the CPU; of a sharded one, what a single file would have held.

    Raises:
        UserError: It is missing, damaged or not one of ours.
    """
    if not verified:
        verify(path)
    if path.is_dir():
        with of_lm(path):
            return sharded.load(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights and buffers of a checkpoint's network, under their names in it."""
    state = checkpoint["state_dict"].items()
    return {key.removeprefix(NET): value for key, value in state if key.startswith(NET)}


@contextmanager
def of_lm(path: Path) -> Iterator[None]:
    """Turn what is raised where a checkpoint lacks something, or has it of another type, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*FOREIGN, dcp.api.CheckpointException) as error:
        raise UserError(
            f"checkpoint {path}: it is no checkpoint of lm's, or of another version ({described(error)})"
        ) from error


@contextmanager
def restored(io: AtomicCheckpointIO) -> Iterator[None]:
    """Turn what is raised between the reading of a checkpoint and the first step with it into a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if io.restoring is None or "loaded state dict" in str(error):  # that is told elsewhere
            raise
        raise UserError(
            f"checkpoint {io.restoring}: training cannot go on from it ({described(error)}): LM_DEBUG=1 shows where; "
            "use another"
        ) from error


def verify(path: Path) -> Path:
    """Return the path of a whole checkpoint.

    Raises:
        UserError: It is missing, damaged or not one of ours; the newest whole one beside it is named.
    """
    if problem := damage(path):
        others = (other for other in newest_first(path.parent) if other != path and not damage(other))
        hint = next((f"; {other} is whole" for other in others), "")
        raise UserError(f"checkpoint {path}: {problem}{hint}")
    return path


def newest_first(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return what the checkpoints of a run say of themselves, where they open.

    The newest comes first: by the start that wrote them, then by step.
    """
    metas = {}
    for path in folder.glob("*.ckpt"):
        try:
            if path.is_file() or path.is_dir():  # who opens a pipe may wait for ever
                metas[path] = peek(path)
        except Exception:  # a damaged file can raise anything; it is no candidate
            continue

    def age(path: Path) -> tuple:
        return metas[path]["start"], metas[path]["step"], path.name == "last.ckpt", path.name

    return {path: metas[path] for path in sorted(metas, key=age, reverse=True)}


def resolve(folder: Path, candidates: Iterable[Path], request: str | None, note: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that training starts from; None is a fresh start.

    Args:
        folder: The run's checkpoints.
        candidates: Those that open, the newest first.
        request: `--ckpt_path`: None, `last`, `auto` or a path.
        note: Is told, in a line, of damaged checkpoints that are passed over.

    Raises:
        UserError: The run has checkpoints and nothing was requested, or what was requested is not to be had.
    """
    found = sorted(folder.glob("*.ckpt"))
    if request not in (None, "last", "auto"):
        return verify(Path(request).expanduser())
    if not found:
        if request == "last":
            raise UserError(f"--ckpt_path last: {folder} has no checkpoint: leave the option out to start, or say auto")
        return None
    if request is None:
        raise UserError(
            f"{folder} has checkpoints already: say --ckpt_path last to continue the run, or --name for a new one"
        )
    last = folder / "last.ckpt"
    if last in found and last not in candidates:
        note(f"{last} is damaged: {damage(last)}")
    for path in candidates:
        problem = damage(path)
        if problem is None:
            if path != last:
                note(f"continuing from {path}, the newest whole checkpoint")
            return path
        note(f"{path} is damaged: {problem}")
    raise UserError(f"--ckpt_path {request}: none of the {len(found)} checkpoints in {folder} is whole; move them away")
