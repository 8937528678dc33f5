"""Write errors, reported in one line that names the folder and says what to do."""

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lm import outputs, storage
from lm.checkpoints import owned
from lm.errors import UserError, causes, setting


@contextmanager
def full_disk_is_a_user_error(folder: Path) -> Iterator[None]:
    """Turn an error in writing a log into a UserError that names the folder.

    TensorBoard writes in a thread of its own, whose error is raised again at the next event; the thread's own traceback
    is suppressed.
    """
    hook = threading.excepthook

    def quiet(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            hook(arguments)

    threading.excepthook = quiet
    try:
        yield
    except (BrokenPipeError, ConnectionError, TimeoutError):  # not disk errors
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        if path and folder.resolve() not in (path.absolute(), *path.absolute().parents):
            raise UserError(f"{path}: {reason}: mend that, and continue with {setting('ckpt_path')} auto") from error
        raise UserError(f"{path or folder} could not be written to ({reason}): {remedy(folder)}") from error
    finally:
        threading.excepthook = hook


@contextmanager
def probed(checkpoints: Path, logs: Path) -> Iterator[None]:
    """Make a run's folders, and check that they are writable and that nothing is in the way of what a run writes.

    Folders made here are removed again if nothing is written in the end, because the start was refused.

    Raises:
        UserError: A folder is not writable, or has something that lm did not write in the way.
    """
    with ExitStack() as made:
        for folder in (checkpoints, logs):
            try:
                made.enter_context(storage.folder_made(folder))
            except OSError as error:
                raise _refused(folder, error) from error
            probe(folder)
        for name in ("last.ckpt", "best.ckpt"):
            owned.check(checkpoints / name)
        yield


def probe(folder: Path) -> None:
    """Check, before any training, that files can be written to a folder.

    Raises:
        UserError: They cannot.
    """
    target = folder / f".probe.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with target.open("xb"):
            pass
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        with target.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{folder} could not be written to ({error.strerror}): {remedy(folder)}") from error
    finally:
        with suppress(OSError):
            target.unlink()


def reason(error: BaseException, folder: Path) -> str:
    """Return the disk's error, in a few words."""
    chain = list(causes(error))
    found = next((one for one in chain if isinstance(one, OSError)), chain[-1])
    if isinstance(found, OSError) and found.errno:
        return os.strerror(found.errno)
    return os.strerror(errno.ENOSPC) if is_full(folder) else (str(found).splitlines() or [""])[0]


def refusal(path: Path, error: BaseException) -> UserError:
    """Return the error for a checkpoint that could not be written."""
    folder = path.parent
    found = next((one for one in causes(error) if isinstance(one, OSError)), None)
    if not storage.nearest(folder).is_dir():
        return _refused(folder, found or OSError())
    if isinstance(found, FileNotFoundError):
        return UserError(f"{path} could not be written: files of lm's were removed from {folder} meanwhile")
    return UserError(f"{path} could not be written ({reason(error, folder)}): {remedy(folder)}")


def remedy(folder: Path) -> str:
    """Return what to do about a folder that cannot be written to."""
    return f"{folder} has {_free(folder) >> 20} MiB free: make room or make it writable; earlier checkpoints are whole"


def is_full(folder: Path) -> bool:
    """Return whether the disk where a folder is has no room left."""
    return _free(folder) < 1 << 20


def _free(folder: Path) -> int:
    """Return the free bytes on the disk where a folder is, or would be."""
    with suppress(OSError):
        return shutil.disk_usage(storage.nearest(folder)).free
    return 0


def _refused(folder: Path, error: OSError) -> UserError:
    existing = storage.nearest(folder)
    if not existing.is_dir():
        return UserError(
            f"{folder} cannot be written to: {existing} is {outputs.kind(existing)}, no folder: move it away"
        )
    owner, us = existing.stat().st_uid, os.getuid()
    advice = f"chown -R {us} it, or run as its owner (docker run --user {owner})"
    if error.errno not in (errno.EACCES, errno.EPERM):
        advice = "make it writable or run elsewhere"
    return UserError(
        f"{folder} cannot be written to ({os.strerror(error.errno or errno.EIO)}): {existing} belongs to user {owner}, "
        f"this is user {us}: {advice}"
    )
