"""Writing shards so that neither a kill at any moment nor a full disk loses or duplicates a token."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm import storage, tokenizers
from lm.corpus import shards, verification
from lm.corpus.shard_header import HEADER, VERSION, Header, read_header

FILES = r"(manifest|progress|tokenizer)\.json|\.stdin\.spool|(train|val|test)-\d+\.(tokens|part|starts)"
"""The files of a prepared corpus, and of one that is being prepared."""
PARTS = r"|\.[\w.]+\.part"
"""Also the temporary files of a process that was killed while writing one of them."""


class ShardWriter:
    """Writes the shards of a corpus; a process killed at any moment can resume from its last `commit`.

    A shard grows in NAME.part, its document starts in NAME.starts; it gets its name when it is full and committed.

    Args:
        folder: The corpus' folder.
        tokenizer: The one that made the tokens.
        shard_tokens: Tokens in a shard; only a split's last has fewer.
        committed: What `commit` wrote under that name, to resume from.
        dtype: Integer type of the stored ids; by default the smallest that holds them.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: tokenizers.Tokenizer,
        shard_tokens: int,
        committed: dict[str, Any] | None = None,
        dtype: np.dtype | None = None,
    ) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.n_vocab, self.dtype = tokenizer.n_vocab, dtype or tokenizer.dtype
        self.itemsize = self.dtype.itemsize
        self.identity = tokenizers.identity(tokenizer.state())
        self.tokens = dict.fromkeys(shards.SPLITS, 0)  # of each split
        self.documents = dict.fromkeys(shards.SPLITS, 0)
        self._dirty: set[Path] = set()
        if committed is not None:
            self.tokens, self.documents = committed["tokens"], committed["documents"]
        self._go_back()

    def append(self, split: str, ids: bytes, starts: np.ndarray) -> None:
        """Add tokens to a split.

        Args:
            split: Which one.
            ids: Their bytes, in the tokenizer's dtype.
            starts: Where documents start among them, int64.
        """
        at, count = 0, len(ids) // self.itemsize
        while at < count:
            k, place = divmod(self.tokens[split], self.shard_tokens)
            take = min(count - at, self.shard_tokens - place)
            mine = starts[(starts >= at) & (starts < at + take)]
            self._add(self._part(split, k), ids[at * self.itemsize : (at + take) * self.itemsize], start=not place)
            self._add(self._starts(split, k), (mine - at + place).astype("<i8").tobytes())
            self.tokens[split] += take
            self.documents[split] += len(mine)
            at += take

    def commit(self, state: dict[str, Any]) -> None:
        """Flush all files, record in progress.json where to resume, and give full shards their names.

        Args:
            state: What the caller needs to resume, as plain values.
        """
        for path in self._dirty:
            storage.flush(path)
        self._dirty.clear()
        storage.flush(self.folder)
        committed = {"tokens": self.tokens, "documents": self.documents}
        storage.write_whole(self.folder / "progress.json", json.dumps(state | {"committed": committed}).encode())
        self._name_full_ones()

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Name the last shards, write the manifest, and return it. Everything must be committed."""
        for split in shards.SPLITS:
            k, place = divmod(self.tokens[split], self.shard_tokens)
            if place:
                self._name(split, k, place)
        manifest = {
            "format": "lm tokens",
            "version": VERSION,
            **manifest,
            "tokenizer": self.identity,
            "dtype": self.dtype.name,
            "vocab_size": self.n_vocab,
            "splits": {
                split: [shards.describe(path, read_header(path)) for path in self._named(split)]
                for split in shards.SPLITS
            },
        }
        manifest["sha256"] = shards.manifest_sum(manifest)
        storage.write_whole(self.folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        (self.folder / "progress.json").unlink(missing_ok=True)
        return manifest

    def _named(self, split: str) -> Iterator[Path]:
        for k in range(-(-self.tokens[split] // self.shard_tokens)):
            yield self._path(split, k)

    def _path(self, split: str, k: int) -> Path:
        return self.folder / f"{split}-{k:05}.tokens"

    def _part(self, split: str, k: int) -> Path:
        return self._path(split, k).with_suffix(".part")

    def _starts(self, split: str, k: int) -> Path:
        return self._path(split, k).with_suffix(".starts")

    def _add(self, path: Path, data: bytes, *, start: bool = False) -> None:
        with path.open("ab") as file:
            if start:
                file.write(bytes(HEADER))
            file.write(data)
        self._dirty.add(path)

    def _go_back(self) -> None:
        """Truncate files to what was committed, and delete later ones."""
        self._name_full_ones()
        for split in shards.SPLITS:
            k, place = divmod(self.tokens[split], self.shard_tokens)
            keep: set[Path] = set()
            if place and not self._path(split, k).exists():  # it exists if `finish` was interrupted
                before = sum(read_header(self._path(split, i)).documents for i in range(k))
                os.truncate(self._part(split, k), HEADER + place * self.itemsize)
                os.truncate(self._starts(split, k), (self.documents[split] - before) * 8)
                keep = {self._part(split, k), self._starts(split, k)}
            ours = re.compile(rf"{split}-\d+\.(part|starts)")
            for path in {path for path in self.folder.iterdir() if ours.fullmatch(path.name)} - keep:
                path.unlink()

    def _name_full_ones(self) -> None:
        for split in shards.SPLITS:
            for k in range(self.tokens[split] // self.shard_tokens):
                if not self._path(split, k).exists():
                    self._name(split, k, self.shard_tokens)

    def _name(self, split: str, k: int, tokens: int) -> None:
        """Turn the parts of a shard into the shard; safe to repeat after an interruption."""
        path, part, starts = self._path(split, k), self._part(split, k), self._starts(split, k)
        if path.exists():
            return
        os.truncate(part, HEADER + tokens * self.itemsize)
        documents = starts.stat().st_size // 8
        with part.open("ab") as file, starts.open("rb") as source:
            for block in iter(lambda: source.read(1 << 20), b""):
                file.write(block)
        header = Header(
            self.itemsize, tokens, documents, self.n_vocab, bytes.fromhex(self.identity), verification.shard_sum(part)
        )
        with part.open("r+b") as file:
            file.write(header.pack())
        storage.flush(part)
        part.rename(path)
        storage.flush(self.folder)
        starts.unlink()


def write_corpus(folder: Path, ids: dict[str, np.ndarray], tokenizer: tokenizers.Tokenizer, size: int) -> None:
    """Write token ids from memory as a corpus, one document per split; size is the text's length in bytes."""
    folder.mkdir(parents=True)
    save_tokenizer(folder, tokenizer)
    writer = ShardWriter(folder, tokenizer, shards.SHARD_TOKENS)
    for split, values in ids.items():
        writer.append(split, values.astype(tokenizer.dtype).tobytes(), np.zeros(1, np.int64))
    writer.commit({})
    writer.finish({"documents": len(ids), "bytes": size, "replaced": 0})


def save_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write tokenizer.json."""
    storage.write_whole(folder / "tokenizer.json", json.dumps(tokenizer.state()).encode())
