"""AtomicCheckpointIO: lm's own implementation of Lightning's interface to checkpoint files."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from torch import distributed

from lm.checkpoints import owned
from lm.checkpoints.background import BackgroundWriter
from lm.checkpoints.checkpoint import copy, load, write
from lm.errors import UserError, described
from lm.training import harmless


class AtomicCheckpointIO(CheckpointIO):
    """Writes to a temporary file beside the target, flushes it to the disk, and renames it.

    Lightning's own writes to $TMPDIR and moves the file from there, which is a plain copy if the run folder is on
    another device, such as a mounted volume. It never flushes the file; and where the folder is not writable, it
    returns as if all were well (Lightning issues 19970, 21253, 21800; the latter still so in 2.6.6).

    Args:
        whole: A checkpoint that `resolve` has just verified. It is read while the network is built, and not verified
            again.
    """

    def __init__(self, whole: Path | None = None) -> None:
        self.writer, self.whole = BackgroundWriter(), whole
        self._state: dict[str, Any] | None = None  # what was saved last; not of a sharded one
        self._folders: set[Path] = set()  # in which something was written
        self.restoring: Path | None = None  # the checkpoint that was read, until the first step after it
        self._ahead: Future[dict[str, Any]] | None = None
        if whole and whole.is_file():
            pool = ThreadPoolExecutor(1)
            self._ahead = pool.submit(load, whole, verified=True)
            pool.shutdown(wait=False)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy a checkpoint's state, and write it in the background, whole or not at all.

        Raises:
            UserError: The one before could not be written; for this one, `writer.check` and `writer.wait` raise it.
        """
        self.writer.wait()
        self._state = self.writer.snapshot(checkpoint)
        self.writer.submit(partial(self._write, Path(path)))

    def copy(self, source: Path, target: Path) -> None:
        """Copy the checkpoint saved last, in the background, once it is written; never over another program's file."""
        self.writer.submit(partial(self._copy, source, target))

    def _write(self, path: Path) -> None:
        """Write the state saved last; try again, once, if somebody removed the folder meanwhile."""
        assert self._state is not None
        self.see(path.parent)
        try:
            write(self._state, path)
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self.see(path.parent)
            write(self._state, path)

    def _copy(self, source: Path, target: Path) -> None:
        if owned.is_foreign(target):  # it appeared while the first was being written
            harmless.note_once(self, f"note: {target} was not written by lm: it is left alone, {source} is whole")
            return
        self.see(target.parent)
        try:
            copy(source, target)
        except (FileNotFoundError, UserError):
            if source.exists():
                raise
            if self._state is not None:  # a sharded one is written again by the next save
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
        """Read the checkpoint that rank 0 chose; raises UserError where it is missing, damaged or not one of ours."""
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


@contextmanager
def restored(io: AtomicCheckpointIO) -> Iterator[None]:
    """Turn errors between reading a checkpoint and the first step after it into a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if io.restoring is None or "loaded state dict" in str(error):  # reported elsewhere
            raise
        raise UserError(
            f"checkpoint {io.restoring}: training cannot go on from it ({described(error)}): LM_DEBUG=1 shows where; "
            "use another"
        ) from error
