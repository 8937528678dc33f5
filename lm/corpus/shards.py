"""Shards: a prepared corpus on disk, as files of tokens that are read in place.

A folder holds tokenizer.json, SPLIT-NNNNN.tokens for each split, and manifest.json, written last: without it the
corpus is incomplete. A shard is a header, its tokens (16 or 32 bits each), and the places in it where documents start
(64 bits each). All numbers are little-endian.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import storage, tokenizers
from lm.corpus import remote, verification
from lm.corpus.shard_header import HEADER, VERSION, Header, read_header
from lm.errors import UserError

SPLITS = ("train", "val", "test")
SHARD_TOKENS = 100_000_000  # in a shard: 200 MB with GPT-2's tokenizer
HELD = 32 << 20  # splits of at most so many bytes are read into memory
OPEN_FILES = 256


class Shard:
    """An open shard, read by offset.

    It is not memory-mapped: a truncated file would kill the process, and mapped pages would look like growing memory.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)
        self.dtype = np.dtype(f"<u{self.header.itemsize}")
        self._file = path.open("rb", buffering=0)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return its tokens start … stop - 1, uint16 or uint32."""
        return self._read(HEADER + start * self.dtype.itemsize, stop - start, self.dtype)

    def starts(self, first: int, last: int) -> np.ndarray:
        """Return where its documents first … last - 1 start in it, int64."""
        body = HEADER + self.header.tokens * self.dtype.itemsize
        return self._read(body + first * 8, last - first, np.dtype("<i8"))

    def _read(self, at: int, count: int, dtype: np.dtype) -> np.ndarray:
        values = np.empty(count, dtype)
        space = values.view(np.uint8).data
        while len(space):
            got = os.preadv(self._file.fileno(), [space], at)
            if not got:
                raise UserError(f"shard {self.path}: it was cut while it was being read")
            space, at = space[got:], at + got
        return values


class Location(NamedTuple):
    """Where a shard is."""

    path: Path
    header: Header
    origin: remote.Remote | None = None
    """Where it is copied from when it is first read."""

    def check(self) -> None:
        """Verify it once per machine, see `verification`; a damaged copy of a remote shard is copied again.

        Raises:
            UserError: It is damaged, or cannot be downloaded.
        """
        if self.origin:
            self.origin.fetch(self.path, self.header)
        try:
            verification.check_once(self.path, self.header)
        except UserError:
            if self.origin is None:
                raise
            self.path.unlink(missing_ok=True)
            self.origin.fetch(self.path, self.header)


class Tokens:
    """The tokens of a split over all its shards, as one sequence: `len(tokens)` and `tokens[start:stop]`.

    Args:
        shards: In order.
    """

    def __init__(self, shards: list[Location]) -> None:
        self.shards = shards
        self.ends = np.cumsum([place.header.tokens for place in shards], dtype=np.int64)
        self.document_ends = np.cumsum([place.header.documents for place in shards], dtype=np.int64)
        self.dtype = np.dtype(f"<u{max((place.header.itemsize for place in shards), default=2)}")
        self._open = lru_cache(OPEN_FILES)(Shard)
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards}  # open files cannot be sent to a worker process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["shards"])  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def documents(self) -> int:
        """How many documents it has."""
        return int(self.document_ends[-1]) if len(self.document_ends) else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        """Return tokens start … stop - 1, uint16 or uint32, read across shard borders."""
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read in order: no step")
        stop = max(start, stop)
        k = int(np.searchsorted(self.ends, start, side="right"))
        if k < len(self.ends) and stop <= self.ends[k]:  # nearly always
            return self._part(k, start, stop)
        pieces = []
        while start < stop:
            end = min(stop, int(self.ends[k]))
            pieces.append(self._part(k, start, end))
            start, k = end, k + 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _shard(self, k: int) -> Shard:
        if k not in self._checked:
            self.shards[k].check()
            self._checked.add(k)
        return self._open(self.shards[k].path)

    def _part(self, k: int, start: int, stop: int) -> np.ndarray:
        first = int(self.ends[k]) - self.shards[k].header.tokens
        return self._shard(k).tokens(start - first, stop - first)

    def starts(self, first: int, last: int) -> np.ndarray:
        """Return where documents first … last - 1 start, int64; the one past the last starts at the end."""
        pieces = []
        k = int(np.searchsorted(self.document_ends, first, side="right"))
        while k < len(self.shards) and first < last:
            header = self.shards[k].header
            before = int(self.document_ends[k]) - header.documents
            end = min(last, int(self.document_ends[k]))
            if first < end:
                here = self._shard(k).starts(first - before, end - before)
                pieces.append(here + (int(self.ends[k]) - header.tokens))
                first = end
            k += 1
        if first <= self.documents < last:
            pieces.append(np.array([len(self)]))
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)


class Corpus(NamedTuple):
    """A prepared corpus."""

    splits: dict[str, Tokens]
    tokenizer: tokenizers.Tokenizer
    manifest: dict[str, Any]


def is_prepared(folder: str | Path) -> bool:
    """Return whether a folder has a prepared corpus, complete or in progress."""
    return any((Path(folder) / name).is_file() for name in ("manifest.json", "progress.json"))


def open_corpus(folder: Path, origin: remote.Remote | None = None) -> Corpus:
    """Open a prepared corpus: its manifest and headers are read now, its tokens on demand.

    Args:
        folder: Where it is.
        origin: Where its shards are copied from; each header is then read once its shard is copied.

    Raises:
        UserError: It is incomplete, or one of its files is damaged or missing; the message names it.
    """
    manifest = read_manifest(folder)
    tokenizer = tokenizers.load_tokenizer(folder / "tokenizer.json")
    identity = tokenizers.identity(tokenizer.state())
    if manifest["tokenizer"] != identity:
        places = [] if origin else [folder / entry["name"] for split in SPLITS for entry in manifest["splits"][split]]
        if places and read_header(places[0]).tokenizer.hex() == identity:  # an older manifest, without a checksum
            raise UserError(f"{folder / 'manifest.json'}: damaged (names another tokenizer): prepare the corpus again")
        raise UserError(f"{folder / 'tokenizer.json'}: not the tokenizer that the shards were made with")
    splits = {}
    for split in SPLITS:
        shards = []
        for entry in manifest["splits"][split]:
            path = folder / entry["name"]
            header = _expected(manifest, entry, tokenizer.n_vocab) if origin else read_header(path)
            if (header.tokenizer.hex(), header.n_vocab) != (identity, tokenizer.n_vocab):
                raise UserError(f"shard {path}: made with another tokenizer than {folder / 'tokenizer.json'}")
            if describe(path, header) != entry:
                raise UserError(f"shard {path}: not the one of {folder / 'manifest.json'}: prepare the corpus again")
            shards.append(Location(path, header, origin))
        splits[split] = Tokens(shards)
    return Corpus(splits, tokenizer, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a corpus' manifest, checked for its form."""
    path = folder / "manifest.json"
    try:
        return check_manifest(json.loads(storage.plain(path).read_text()))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: not a whole prepared corpus (no manifest.json): let lm prepare finish it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}): prepare the corpus again") from error


def check_manifest(manifest: Any) -> dict[str, Any]:
    """Return a manifest; raises ValueError if it does not have the form that `finish` writes."""
    if not isinstance(manifest, dict) or manifest.get("format") != "lm tokens" or manifest.get("version") != VERSION:
        raise ValueError(f"not version {VERSION} of the manifest")
    if manifest.get("sha256", (known := manifest_sum(manifest))) != known:
        raise ValueError("its checksum is wrong")
    splits = manifest.get("splits")
    if not isinstance(manifest.get("tokenizer"), str) or not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise ValueError("its tokenizer or splits are missing")
    for key in ("documents", "bytes", "replaced"):
        if not isinstance(manifest.get(key), int) or manifest[key] < 0:
            raise ValueError(f"its {key} are no number")
    for entry in (entry for split in SPLITS for entry in _entries(splits[split])):
        name = entry.get("name")
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a shard")
    return manifest


def manifest_sum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own checksum; manifests of earlier releases have none."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _entries(shards: Any) -> list[dict[str, Any]]:
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        raise ValueError("a split is not a list of shards")
    return shards


def _expected(manifest: dict[str, Any], entry: dict[str, Any], n_vocab: int) -> Header:
    """Return the header that a shard must have according to the manifest."""
    try:
        itemsize = np.dtype(manifest["dtype"]).itemsize
        tokenizer, checksum = bytes.fromhex(manifest["tokenizer"]), bytes.fromhex(entry["sha256"])
        return Header(itemsize, int(entry["tokens"]), int(entry["documents"]), n_vocab, tokenizer, checksum)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"manifest of {entry.get('name')}: damaged ({error}): upload the corpus again") from error


def describe(path: Path, header: Header) -> dict[str, Any]:
    """Return a shard's entry in the manifest."""
    return {
        "name": path.name,
        "tokens": header.tokens,
        "documents": header.documents,
        "sha256": header.checksum.hex(),
    }


def verify(folder: Path) -> Corpus:
    """Open a corpus and verify all its shards.

    Raises:
        UserError: One is damaged; the message names the file.
    """
    corpus = open_corpus(folder)
    for tokens in corpus.splits.values():
        for path, header, _ in tokens.shards:
            verification.check(path, header)
            verification.remember(path, header)
    return corpus


def in_memory(tokens: Tokens) -> np.ndarray | Tokens:
    """Return a small split as an array, the fastest way and safe from changes to the file; a large one as it is."""
    return tokens[:] if len(tokens) * tokens.dtype.itemsize <= HELD else tokens


def concatenated(splits: Iterable[Tokens]) -> Tokens:
    """Return splits of several corpora as one."""
    return Tokens([shard for tokens in splits for shard in tokens.shards])
