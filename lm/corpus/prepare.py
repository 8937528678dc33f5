"""Preparing a corpus: text to shards of tokens, in parallel, to the same bytes even after interruptions.

One process reads and writes, others encode. Results are written in the order of reading, so neither the number of
processes nor an interruption changes a byte.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lm import bounds, outputs, storage, tokenizers
from lm.corpus import formats, shards, source_files
from lm.corpus.formats import Settings
from lm.corpus.shard_header import MAGIC
from lm.corpus.shard_writer import FILES, ShardWriter, save_tokenizer
from lm.corpus.workers import DocumentBatch, Encode, Piece, ordered, split_of
from lm.errors import UserError, setting

LINE_SECONDS = 60.0  # between lines of progress where standard error is not a terminal
COMMIT_SECONDS = 2.0  # of work that a kill may lose
COUNTS = ("documents", "bytes", "replaced", "skipped")
BATCH_PIECES = 2048  # most documents that are encoded together


@dataclass
class Preparation:
    """What is prepared, and how.

    Args:
        source: Files, folders, globs, or - for standard input.
        tokenizer: char, byte, gpt2, cl100k_base, o200k_base, or the path of a .tiktoken file.
        output: The folder of the prepared corpus.
        val_fraction: Share for validation.
        test_fraction: Share for testing.
        split: documents assigns each document by a hash of its content; characters cuts one text, as TextData does;
            auto is characters where the source is one text, else documents.
        reading: How text is read.
        dtype: Integer type of the stored ids; auto is the smallest that holds them.
        shard_tokens: Tokens in a shard.
        workers: Processes that encode; by default one per core.
        overwrite: Replace another corpus that lm prepare wrote there.
    """

    source: list[str]
    tokenizer: str
    output: Path
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    split: Literal["auto", "documents", "characters"] = "auto"
    reading: Settings = field(default_factory=Settings)
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    shard_tokens: int = shards.SHARD_TOKENS
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        bounds.check(vars(self), "lm.Preparation", "", UserError)
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                f"{setting('val_fraction')} {self.val_fraction}, {setting('test_fraction')} {self.test_fraction}: "
                "leave nothing to train on"
            )


def prepare(job: Preparation) -> dict[str, Any]:
    """Prepare a corpus; resume one that was interrupted, do nothing if it is complete.

    Returns:
        tokens, documents, bytes (of UTF-8), shards, replaced bytes, and skipped rows where there are any.

    Raises:
        UserError: The source cannot be read, the output folder is not free, or the disk is full.
    """
    outputs.check_place(job.output, made="folder")
    if job.output.is_file():
        raise UserError(f"{setting('output')} {job.output}: it is a file: say an empty or a new folder")
    try:
        with (
            storage.folder_made(job.output),
            storage.alone(job.output, f"{setting('output')} {job.output}: another lm prepare is at work in it"),
        ):
            return _Run(job).result()
    except OSError as error:  # most errors of a source are caught before
        named = Path(os.fsdecode(error.filename or job.output)).absolute()
        if job.output.absolute() not in (named, *named.parents):
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise UserError(
            f"{setting('output')} {job.output}: could not be written ({error.strerror or error}): mend that and "
            "give the same command again, it goes on from there"
        ) from error


class _Run:
    def __init__(self, job: Preparation) -> None:
        self.job, self.folder = job, job.output
        self.spool = self.folder / ".stdin.spool"
        for part in storage.parts(self.folder, r"(manifest|progress|tokenizer)\.json|\.stdin\.spool"):
            part.unlink()
        if "-" in job.source:
            self._spool_stdin()
        self.files = [self.spool] if "-" in job.source else source_files.find(job.source, job.reading.unread)
        self.by_characters = job.split == "characters" or (
            job.split == "auto" and len(self.files) == 1 and formats.reader_of(self.files[0], job.reading) is None
        )
        if self.by_characters and (len(self.files) > 1 or formats.reader_of(self.files[0], job.reading)):
            name = setting("split")
            raise UserError(f"{name} characters: cuts one text file, for other sources say {name} documents")
        self.sizes = [path.stat().st_size for path in self.files]

    def result(self) -> dict[str, Any]:
        """Do what is left, and return the summary."""
        try:
            progress = self._progress()
        except UserError:
            self._clear(*([self.spool.name] if "-" in self.job.source else []))
            raise
        if progress is None:
            self._clear("progress.json", self.spool.name)
            return summary(shards.open_corpus(self.folder).manifest)
        tokenizer = tokenizers.load_tokenizer(self.folder / "tokenizer.json")
        dtype = tokenizer.dtype if self.job.dtype == "auto" else np.dtype(self.job.dtype)
        if np.iinfo(dtype).max < tokenizer.n_vocab - 1:
            raise UserError(
                f"{setting('dtype')} {dtype}: too small for the tokenizer's {tokenizer.n_vocab} ids: say uint32"
            )
        writer = ShardWriter(self.folder, tokenizer, self.job.shard_tokens, progress.get("committed"), dtype)
        writer.commit(progress)
        counts = self._encode_all(writer, progress)
        if not sum(writer.tokens.values()):
            self._clear("progress.json", "tokenizer.json", self.spool.name)
            raise UserError(f"{setting('source')} {' '.join(self.job.source)}: it is empty")
        if self.by_characters:
            counts["documents"] = 1  # one text, though each split has a part of it
        manifest = writer.finish({"plan": progress["plan"], **counts})
        self._clear(self.spool.name)
        return summary(manifest)

    def _progress(self) -> dict[str, Any] | None:
        """Return where to resume, for a new corpus the start; None where all is done."""
        plan = self._plan()
        for name in ("manifest.json", "progress.json"):
            path = self.folder / name
            if not path.exists():
                continue
            if not self._is_own(storage.plain(path)):
                raise UserError(
                    f"{setting('output')} {self.folder}: its {name} is not lm prepare's: say another folder"
                )
            known = json.loads(path.read_text())
            if known["plan"] != plan and not self.job.overwrite:
                raise UserError(
                    f"{setting('output')} {self.folder}: holds another corpus, or this one from other text or "
                    f"settings: say another folder, or {setting('overwrite')}"
                )
            if known["plan"] != plan:
                self._refuse_others(path for path in self.folder.iterdir() if not self._is_own(path))
                self._clear(*(p.name for p in self.folder.iterdir() if p != self.spool))
                break
            return known if name == "progress.json" else None
        self._refuse_others(p for p in self.folder.iterdir() if p != self.spool and not self._is_tokenizer(p))
        save_tokenizer(self.folder, self._make_tokenizer())
        return {"plan": plan, "place": [0, 0, 0, 0], "counts": dict.fromkeys(COUNTS, 0)}

    def _plan(self) -> dict[str, Any]:
        """Return what must be equal for one run to resume another."""
        job, digest = self.job, hashlib.sha256()
        for path in self.files:
            stat = path.stat()
            what = storage.sha256(path) if path == self.spool else f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
            digest.update(f"{what}\n".encode(errors="surrogateescape"))
        name = job.tokenizer if job.tokenizer == "char" else tokenizers.identity(self._make_tokenizer().state())
        return {
            "source": digest.hexdigest(),
            "tokenizer": name,
            "val_fraction": job.val_fraction,
            "test_fraction": job.test_fraction,
            "split": "characters" if self.by_characters else "documents",
            "text_key": job.reading.text_key,
            "errors": job.reading.errors,
            "format": job.reading.format,
            "dtype": job.dtype,
            "shard_tokens": job.shard_tokens,
        }

    def _make_tokenizer(self) -> tokenizers.Tokenizer:
        def symbols() -> set[str]:
            found: set[str] = set()
            settings = replace(self.job.reading)
            with tqdm(total=sum(self.sizes), desc="characters", **_bar()) as bar:
                for k, path in enumerate(self.files):
                    for text in _texts(path, settings):
                        found.update(text)
                    bar.update(self.sizes[k])
            return found

        return tokenizers.make(self.job.tokenizer, symbols, documents=not self.by_characters)

    def _encode_all(self, writer: ShardWriter, progress: dict[str, Any]) -> dict[str, int]:
        """Encode and write all that is left; return the counts."""
        counts: dict[str, int] = progress["counts"]
        begun = time.monotonic()
        committed_at = said_at = begun
        job, had = self.job, sum(writer.tokens.values())
        encode = Encode(str(self.folder), writer.identity, str(writer.dtype), job.val_fraction, job.test_fraction)
        file = progress["place"][0]
        with (
            ordered(encode, self._batches(*progress["place"]), job.workers or os.cpu_count() or 1) as results,
            tqdm(total=sum(self.sizes), initial=sum(self.sizes[:file]), desc="preparing", **_bar()) as bar,
        ):
            for batch, done in results:
                for split, ids in done.ids.items():
                    writer.append(split, ids, done.starts[split])
                counts["documents"] += done.documents
                counts["bytes"] += done.bytes
                counts["replaced"], counts["skipped"] = batch.replaced, batch.skipped
                progress["place"] = list(batch.place)
                speed = (sum(writer.tokens.values()) - had) / (time.monotonic() - begun)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(batch.position - bar.n)
                if not sys.stderr.isatty() and time.monotonic() - said_at > LINE_SECONDS:
                    print(bar, file=sys.stderr, flush=True)
                    said_at = time.monotonic()
                if time.monotonic() - committed_at > COMMIT_SECONDS:
                    writer.commit(progress)
                    committed_at = time.monotonic()
        writer.commit(progress)
        return counts

    def _batches(self, first_file: int, skip: int, replaced: int, skipped: int = 0) -> Iterator[DocumentBatch]:
        """Yield the rest of the source in batches, from a `DocumentBatch.place`; older ones have three numbers."""
        batch: list[Piece] = []
        size, before = 0, sum(self.sizes[:first_file])
        for k in range(first_file, len(self.files)):
            settings, number = replace(self.job.reading), 0

            def made(position: int) -> DocumentBatch:
                place = (k, number, replaced, skipped)  # noqa: B023
                return DocumentBatch(batch, place, position, replaced + settings.replaced, skipped + settings.skipped)  # noqa: B023

            for number, (piece, position) in enumerate(self._pieces(self.files[k], settings), 1):
                if k == first_file and number <= skip:
                    continue
                batch.append(piece)
                size += len(piece.text)
                if size >= formats.PIECE or len(batch) >= BATCH_PIECES:
                    yield made(before + position)
                    batch, size = [], 0
            if k == len(self.files) - 1:  # the last, even if all its rows were skipped
                yield made(before + self.sizes[k])
            replaced, skipped = replaced + settings.replaced, skipped + settings.skipped
            before += self.sizes[k]

    def _pieces(self, path: Path, settings: formats.Settings) -> Iterator[tuple[Piece, int]]:
        """Yield a file's pieces, and how many bytes of it were read."""
        reader = formats.reader_of(path, settings)
        with formats.opened(path) as (file, raw):
            if reader is not None:
                for text in reader(file, str(path), settings):
                    if text:
                        yield Piece(text, None, True, True), raw.tell()
                return
            parts = formats.pieces(formats.text_blocks(file, str(path), settings))
            made = self._cut(path, parts) if self.by_characters else self._long(path, parts)
            for piece in made:
                yield piece, raw.tell()

    def _long(self, path: Path, parts: Iterator[str]) -> Iterator[Piece]:
        """Yield a text as one document; one of several pieces is first read once for its hash."""
        text = next(parts, "")
        following = next(parts, None)
        if following is None:
            if text:
                yield Piece(text, None, True, True)
            return
        digest = hashlib.blake2b(digest_size=8)
        for part in _texts(path, replace(self.job.reading)):
            digest.update(part.encode())
        split = split_of(digest.digest(), self.job.val_fraction, self.job.test_fraction)
        yield Piece(text, split, True, False)
        for part in parts:
            yield Piece(following, split, False, False)
            following = part
        yield Piece(following, split, False, True)

    def _cut(self, path: Path, parts: Iterator[str]) -> Iterator[Piece]:
        """Yield a text cut by characters into train, validation and test, without an end-of-text token."""
        total = sum(map(len, _texts(path, replace(self.job.reading))))
        val, test = self.job.val_fraction, self.job.test_fraction
        ends = {"train": int(total * (1 - val - test)), "val": int(total * (1 - test)), "test": total}
        at = 0
        for part in parts:
            begin = 0
            for split, end in ends.items():
                low, high = max(begin - at, 0), min(end - at, len(part))
                if low < high:
                    yield Piece(part[low:high], split, at + low == begin, False)
                begin = end
            at += len(part)

    def _spool_stdin(self) -> None:
        if self.job.source != ["-"]:
            raise UserError(f"{setting('source')} -: standard input stands alone")
        with storage.whole(self.spool) as spool:  # it is read twice
            shutil.copyfileobj(sys.stdin.buffer, spool, 1 << 20)

    def _is_tokenizer(self, path: Path) -> bool:
        """Return whether a file is a tokenizer that an interrupted lm left, not another program's file."""
        with suppress(UserError, OSError, LookupError, ValueError, TypeError, AttributeError):
            return path.name == "tokenizer.json" and bool(tokenizers.load_tokenizer(path))
        return False

    def _is_own(self, path: Path) -> bool:
        """Return whether lm prepare wrote a file: its name is one of its own, and its contents are."""
        if path.is_symlink() or not path.is_file() or not re.fullmatch(FILES, path.name):
            return False
        if path.name == "tokenizer.json":
            return self._is_tokenizer(path)
        if path.suffix == ".json":
            with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                known = json.loads(path.read_text())
                kept = (
                    known["format"] == "lm tokens"
                    if path.name == "manifest.json"
                    else known["place"] and known["counts"]
                )
                return bool(kept) and isinstance(known["plan"]["source"], str) and "tokenizer" in known["plan"]
            return False
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
        if path.suffix == ".tokens":
            return head == MAGIC
        return path.suffix != ".part" or head == MAGIC or not head.strip(b"\0")  # a part gets its header at the end

    def _refuse_others(self, others: Iterable[Path]) -> None:
        if other := next(iter(others), None):
            raise UserError(
                f"{setting('output')} {self.folder}: holds other files ({other.name}): say an empty or a new folder"
            )

    def _clear(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def _texts(path: Path, settings: formats.Settings) -> Iterator[str]:
    """Yield all characters of a file, in blocks or documents."""
    reader = formats.reader_of(path, settings) or formats.text_blocks
    with formats.opened(path) as (file, _):
        yield from reader(file, str(path), settings)


def _bar() -> dict[str, Any]:
    """Return the settings of progress bars: bytes, speed, time left; without a terminal, shown only on request."""
    never = {} if sys.stderr.isatty() else {"delay": float("inf")}
    return {"unit": "B", "unit_scale": True, "mininterval": 0.5, **never}


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what `lm prepare` prints of a corpus."""
    entries = [entry for split in shards.SPLITS for entry in manifest["splits"][split]]
    return {
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": manifest["documents"],
        "bytes": manifest["bytes"],
        "shards": len(entries),
        "replaced": manifest["replaced"],
    } | ({"skipped": manifest["skipped"]} if manifest.get("skipped") else {})
