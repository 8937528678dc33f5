"""Which files the sources of a corpus stand for: paths, folders and globs; and what of them is left out."""

import errno
import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.corpus.formats import IN_FOLDERS, TextError, suffix
from lm.errors import UserError, setting


def find(sources: Iterable[str], unread: list[str] | None = None) -> list[Path]:
    """Return the files that paths, folders and globs stand for, in an order that depends on their names alone.

    A folder stands for its files of known formats; a glob or a path takes any file, one of unknown suffix as text.

    Args:
        sources: Paths, folders and globs.
        unread: Collects what cannot be read in folders and under globs, with the reason; if None, that is an error.

    Raises:
        UserError: A source matches no file, is a pipe or a device, or is a loop of symbolic links.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if not source:
            raise UserError("source '': it is empty: say a file, a folder or a glob")
        path = Path(source).expanduser()
        try:
            if path.is_dir():
                matches = sorted(p for p in _walk(path, (), unread) if _is_taken(p))
            elif path.exists() or not glob.has_magic(source):
                if not stat.S_ISREG(path.stat().st_mode):
                    raise UserError(f"source {source}: a pipe or a device, which cannot be read twice: say a file")
                matches = [path]
            else:
                named = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
                matches = [p for p in named if _readable(p, unread) and p.is_file()]
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f"source {source}: {_reason(path, error)}") from error
        if not matches:
            raise UserError(
                f"source {source}: no file matches" + (f" ({', '.join(IN_FOLDERS)})" if path.is_dir() else "")
            )
        found |= dict.fromkeys(matches)
    return list(found)


def left_out(sources: Iterable[str]) -> str | None:
    """Return a line that counts and names what `find` leaves out of folders and globs; None where there is nothing."""
    paths = [Path(source).expanduser() for source in sources]
    others = {p for path in paths if path.is_dir() for p in _walk(path, (), []) if not _is_taken(p)}
    globs = [path for path in paths if not path.exists() and glob.has_magic(str(path))]
    others |= {p for path in globs for p in map(Path, glob.glob(str(path), recursive=True)) if _is_odd(p)}
    if not others:
        return None
    named = _few([*map(str, sorted(others))])
    many = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    kinds = ", ".join(IN_FOLDERS) + ", hidden, or a pipe" * any(suffix(p) in IN_FOLDERS for p in others)
    return f"note: {many} left out, of another kind than {kinds}: {named} (a path or a glob takes any)"


def not_read(sources: Iterable[str]) -> str | None:
    """Return a line that counts and names what `find` could not read; None where it read all."""
    unread: list[str] = []
    find(sources, unread)
    if not unread:
        return None
    many = "1 source" if len(unread) == 1 else f"{len(unread):,} sources"
    return f"note: {many} could not be read and {'is' if len(unread) == 1 else 'are'} left out: {_few(unread)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _reason(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno == errno.ELOOP or "loop" in str(error).lower():
        return "a loop of symbolic links"
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there"
    return f"{error.strerror}" if error.filename in (None, str(path)) else f"{error.filename}: {error.strerror}"


def _walk(folder: Path, above: tuple[str, ...], unread: list[str] | None) -> Iterator[Path]:
    """Yield all that lies below a folder and can be read; of a hidden folder, only itself."""
    real = os.path.realpath(folder)
    if real in above:
        _leave(folder, f"a loop of symbolic links leads back to {real}", unread)
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        _leave(folder, _reason(folder, error), unread)
        return
    for entry in entries:
        path = Path(entry.path)
        hidden = entry.name.startswith(".")
        if not hidden and not _readable(path, unread):
            continue
        if entry.is_dir() and not hidden:
            yield from _walk(path, (*above, real), unread)
        else:
            yield path


def _is_taken(path: Path) -> bool:
    """Return whether a folder stands for a file in it."""
    return suffix(path) in IN_FOLDERS and not path.name.startswith(".") and path.is_file()


def _is_odd(path: Path) -> bool:
    """Return whether there is something that is neither a file nor a folder."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _readable(path: Path, unread: list[str] | None) -> bool:
    """Return whether a file may be read; a dangling link is an error, not silently left out."""
    try:
        path.stat()
        if os.access(path, os.R_OK):
            return True
        _leave(path, os.strerror(errno.EACCES), unread)
    except OSError as error:
        _leave(path, _reason(path, error), unread)
    return False


def _leave(path: Path, reason: str, unread: list[str] | None) -> None:
    if unread is None:
        raise TextError(f"source {path}: {reason}", f": mend it, or let {setting('errors')} skip leave it out")
    unread.append(f"{path} ({reason})")
