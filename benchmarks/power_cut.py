"""A simulated disk that loses what was not flushed: reads a trace of strace, and replays it.

POSIX promises no more than this: a file's bytes are there after fsync of the file, and its name after fsync of its
folder. After a power cut, names may be those of the last flush, or the newest: both are tried.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CALLS = (
    "open", "openat", "creat", "close", "write", "pwrite64", "writev", "lseek", "fsync", "fdatasync", "ftruncate",
    "truncate", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "link", "linkat",
    "symlink", "symlinkat", "sendfile", "copy_file_range",
)  # fmt: skip
TIME = 10**9  # every file's modification time: a power cut does not change a source's
OPERAND = re.compile(
    r'(?P<fd>AT_FDCWD|\d+)<(?P<at>[^>]*)>(?:\(deleted\))?(?:, "(?P<below>(?:\\x..)*)")?|"(?P<text>(?:\\x..)*)"'
)


class Call(NamedTuple):
    """A call that a process has made on what lies in the folder. All paths are relative to it."""

    thread: int
    name: str
    operands: tuple[str, ...]
    """What strace compares with the paths it is told to watch: files, or the folder that a name is looked up in."""
    paths: tuple[str, ...]
    """The files that are meant."""
    fds: tuple[int, ...]
    data: bytes
    words: str
    """The arguments after the first operand."""
    result: int


def trace_options() -> list[str]:
    """Return strace's options for a trace that `calls_of` reads: paths of descriptors, all bytes, in hexadecimal."""
    return ["-y", "-xx", "-s", str(1 << 24), "-e", "trace=" + ",".join(f"?{name}" for name in CALLS)]


def calls_of(trace: Path, folder: Path) -> list[Call]:
    """Return the calls of a trace that concern a folder, including failed ones."""
    found = []
    for thread, line in _lines(trace):
        if match := re.fullmatch(r"(\w+)\((.*)\)\s+= (-?\d+).*", line):
            name, arguments, result = match[1], match[2], int(match[3])
            call = _call(thread, name, arguments, result, f"{folder}/")
            if call.operands or (call.fds and name in ("close", "lseek")):
                found.append(call)
    return found


def _lines(trace: Path) -> Iterator[tuple[int, str]]:
    """Yield a trace's calls with their threads; a call that another thread's output splits is joined where it ends.

    All but close: its descriptor is free, and may be another thread's next file, before close returns.
    """
    begun: dict[int, str] = {}
    for line in trace.read_text().splitlines():
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            begun[int(thread)] = rest.removesuffix("<unfinished ...>").rstrip()
            if rest.startswith("close("):
                yield int(thread), f"{begun.pop(int(thread))}) = 0"
        elif resumed := re.match(r"<\.\.\. \w+ resumed>\s*", rest):
            if first := begun.pop(int(thread), ""):
                yield int(thread), first + rest[resumed.end() :]
        else:
            yield int(thread), rest


def _call(thread: int, name: str, arguments: str, result: int, root: str) -> Call:
    operands, paths, fds, texts = [], [], [], []
    for match in OPERAND.finditer(arguments):
        at, below = _text(match["at"]), match["below"] or match["text"]
        if match["fd"] and match["fd"] != "AT_FDCWD":
            fds.append(int(match["fd"]))
        if "at" not in name and name not in ("open", "creat", "rename", "unlink", "rmdir", "mkdir", "link", "truncate"):
            operands.append(at or "")  # a call on a descriptor: what follows is data
            texts.append(_bytes(below))
            continue
        name_below = _text(below)
        path = str(PurePosixPath(at or root, name_below))
        paths.append(path)
        operands.append(path if match["fd"] in (None, "AT_FDCWD") else at)
    inside = [str(PurePosixPath(one)).removeprefix(root) for one in operands if one.startswith(root)]
    files = [one.removeprefix(root) if one.startswith(root) else "" for one in paths]
    return Call(thread, name, tuple(inside), tuple(files), tuple(fds), b"".join(texts), arguments, result)


def _bytes(text: str | None) -> bytes:
    return bytes.fromhex((text or "").replace("\\x", ""))


def _text(text: str | None) -> str:
    return os.fsdecode(_bytes(text))


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.live, self.kept = bytearray(data), data


class _Folder:
    def __init__(self) -> None:
        self.live: dict[str, _File | _Folder] = {}
        self.kept: dict[str, _File | _Folder] = {}


class _Open:
    def __init__(self, node: "_File | _Folder", append: bool) -> None:
        self.node, self.append, self.offset = node, append, 0


class Disk:
    """What lies in a folder, and what of it would be there after a power cut.

    Args:
        folder: What it begins with, all of it flushed.
    """

    def __init__(self, folder: Path) -> None:
        self.root = _load(folder)
        self.fds: dict[int, _Open] = {}

    def do(self, call: Call) -> None:
        """Replay a call."""
        if call.result < 0:
            return
        action = getattr(self, "_" + re.sub(r"(at|at2|64)$", "", call.name), None)
        assert action, f"{call.name} is not known"
        action(call)

    def cuts(self, calls: Iterable[Call]) -> Iterator[tuple[Call, "State"]]:
        """Replay the calls, and yield after each what a power cut would leave, if that has changed.

        Files have their flushed contents; names are the flushed ones or the newest: a disk may write names early.
        """
        seen = set()
        for call in calls:
            self.do(call)
            for all_names in (False, True):
                state = _left(self.root, all_names)
                if state not in seen:
                    seen.add(state)
                    yield call, state

    def _parent(self, path: str) -> tuple[_Folder, str]:
        *folders, name = PurePosixPath(path).parts
        node = self.root
        for part in folders:
            node = node.live[part]  # type: ignore[assignment]
        return node, name

    def _open(self, call: Call) -> None:
        self.fds.pop(call.result, None)
        if not call.paths[0]:
            return
        parent, name = self._parent(call.paths[0])
        if name not in parent.live:
            parent.live[name] = _File()
        node = parent.live[name]
        if "O_TRUNC" in call.words and isinstance(node, _File):
            node.live.clear()
        self.fds[call.result] = _Open(node, "O_APPEND" in call.words)

    def _close(self, call: Call) -> None:
        self.fds.pop(call.fds[0], None)

    def _lseek(self, call: Call) -> None:
        if call.fds[0] in self.fds:
            self.fds[call.fds[0]].offset = call.result

    def _write(self, call: Call) -> None:
        self._put(self.fds[call.fds[0]], call.data[: call.result])

    _writev = _write

    def _put(self, file: _Open, data: bytes, offset: int | None = None) -> None:
        assert isinstance(file.node, _File)
        at = len(file.node.live) if file.append else file.offset if offset is None else offset
        file.node.live.extend(bytes(max(0, at - len(file.node.live))))
        file.node.live[at : at + len(data)] = data
        if offset is None:
            file.offset = at + len(data)

    def _pwrite(self, call: Call) -> None:
        self._put(self.fds[call.fds[0]], call.data[: call.result], int(call.words.rsplit(", ", 1)[1]))

    def _sendfile(self, call: Call) -> None:
        target, source = (self.fds[fd] for fd in call.fds)
        given = re.search(r"\[(\d+)\]", call.words)
        start = int(given[1]) if given else source.offset
        self._put(target, bytes(source.node.live[start : start + call.result]))  # type: ignore[misc,arg-type]
        source.offset += 0 if given else call.result

    def _copy_file_range(self, call: Call) -> None:
        source, target = (self.fds[fd] for fd in call.fds)
        start = source.offset
        self._put(target, bytes(source.node.live[start : start + call.result]))  # type: ignore[misc,arg-type]
        source.offset += call.result

    def _fsync(self, call: Call) -> None:
        node = self.fds[call.fds[0]].node
        if isinstance(node, _File):
            node.kept = bytes(node.live)
        else:
            node.kept = dict(node.live)

    _fdatasync = _fsync

    def _ftruncate(self, call: Call) -> None:
        self._cut_to(self.fds[call.fds[0]].node, call)

    def _truncate(self, call: Call) -> None:
        parent, name = self._parent(call.paths[0])
        self._cut_to(parent.live[name], call)

    def _cut_to(self, node: _File | _Folder, call: Call) -> None:
        length = int(call.words.rsplit(", ", 1)[1])
        assert isinstance(node, _File)
        del node.live[length:]
        node.live.extend(bytes(length - len(node.live)))

    def _rename(self, call: Call) -> None:
        (old, old_name), (new, new_name) = (self._parent(path) for path in call.paths)
        new.live[new_name] = old.live.pop(old_name)

    def _link(self, call: Call) -> None:
        (old, old_name), (new, new_name) = (self._parent(path) for path in call.paths)
        new.live[new_name] = old.live[old_name]

    def _unlink(self, call: Call) -> None:
        parent, name = self._parent(call.paths[0])
        del parent.live[name]

    _rmdir = _unlink

    def _mkdir(self, call: Call) -> None:
        parent, name = self._parent(call.paths[0])
        parent.live[name] = _Folder()


def _load(folder: Path) -> _Folder:
    node = _Folder()
    for path in folder.iterdir():
        node.live[path.name] = _load(path) if path.is_dir() else _File(path.read_bytes())
    node.kept = dict(node.live)
    return node


State = tuple[tuple[str, "bytes | State"], ...]
"""The files and folders of a folder."""


def _left(node: _Folder, all_names: bool) -> State:
    children = (node.live if all_names else node.kept).items()
    return tuple(
        (name, child.kept if isinstance(child, _File) else _left(child, all_names)) for name, child in sorted(children)
    )


def lay(state: State, folder: Path) -> None:
    """Make a folder that has what a power cut left."""
    folder.mkdir()
    for name, child in state:
        if isinstance(child, bytes):
            (folder / name).write_bytes(child)
            os.utime(folder / name, (TIME, TIME))
        else:
            lay(child, folder / name)
