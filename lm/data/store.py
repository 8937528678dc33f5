"""Token files: a corpus tokenized once, under a hash of its content, and opened as memory maps ever after."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data import corpora, files, tokenizers
from lm.errors import UserError

FORMAT = 1
SPLITS = ("train", "val", "test")


class Tokens(NamedTuple):
    """A tokenized corpus."""

    splits: dict[str, np.ndarray]
    """Ids of each split, uint16 or uint32 (T,), mapped from the disk."""
    tokenizer: tokenizers.Tokenizer


def load(
    corpus: str,
    tokenizer: str | tokenizers.Tokenizer,
    *,
    val_fraction: float,
    test_fraction: float,
) -> Tokens:
    """Open a corpus as token ids, tokenizing it first where that has not been done.

    The corpus is cut by characters: the first part trains, then comes validation, then test. Each part is tokenized
    by itself, so no token straddles a border.

    Args:
        corpus: A name or path, see `corpora.find`.
        tokenizer: A name for `tokenizers.make`, or a tokenizer already at hand.
        val_fraction: Share of the characters that validates.
        test_fraction: Share of the characters that tests.

    Raises:
        UserError: The corpus cannot be had, is empty, or has symbols that the tokenizer lacks.
    """
    source = corpora.find(corpus)
    kind = tokenizer if isinstance(tokenizer, str) else tokenizers.identity(tokenizer.state())
    if kind.endswith(".tiktoken") and Path(kind).expanduser().is_file():
        kind = files.sha256(Path(kind).expanduser())
    key = tokenizers.identity(
        {"format": FORMAT, "corpus": source.fingerprint, "tokenizer": kind, "fractions": [val_fraction, test_fraction]}
    )
    folder = files.tokens_home() / key[:32]
    if (opened := _open(folder)) is not None:
        return opened
    text = source.read()
    if not text:
        raise UserError(f"corpus {corpus}: it is empty")
    if isinstance(tokenizer, str):
        tokenizer = tokenizers.make(tokenizer, lambda: text)
    first, second = int(len(text) * (1 - val_fraction - test_fraction)), int(len(text) * (1 - test_fraction))
    parts = {"train": text[:first], "val": text[first:second], "test": text[second:]}
    _write(folder, {name: tokenizer.encode(part) for name, part in parts.items()}, tokenizer)
    opened = _open(folder)
    assert opened is not None
    return opened


def _write(folder: Path, ids: dict[str, np.ndarray], tokenizer: tokenizers.Tokenizer) -> None:
    """Write a folder of token files in one step: it is there whole, or not at all."""
    dtype = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
    part = folder.with_name(f".part-{os.getpid()}-{folder.name}")
    if folder.exists() and _open(folder) is None:  # torn, by a full disk say
        shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, values in ids.items():
            (part / f"{name}.bin").write_bytes(values.astype(dtype).tobytes())
        meta = {"dtype": dtype, "splits": {k: len(v) for k, v in ids.items()}, "tokenizer": tokenizer.state()}
        (part / "meta.json").write_text(json.dumps(meta))
        os.rename(part, folder)
    except OSError as error:
        if _open(folder) is None:  # else another process was first, with the same content
            raise UserError(
                f"{folder.parent} could not be written to ({error.strerror}): make room, or set LM_DATA_HOME to "
                "another folder"
            ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(folder: Path) -> Tokens | None:
    """Map a folder of token files; None where there is none or it is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {}
        for name in SPLITS:
            path, dtype, count = folder / f"{name}.bin", np.dtype(meta["dtype"]), meta["splits"][name]
            if path.stat().st_size != count * dtype.itemsize:
                return None
            # a plain view: slicing np.memmap itself costs ten times as much; an empty file cannot be mapped
            splits[name] = np.asarray(np.memmap(path, dtype, mode="r")) if count else np.empty(0, dtype)
        return Tokens(splits, tokenizers.from_state(meta["tokenizer"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
