"""Corpora as tokens: prepared ones as they are, others tokenized once and cached under a hash of their content."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from lm import storage, tokenizers
from lm.corpus import remote, shards, sources
from lm.corpus.shard_writer import FILES, PARTS, write_corpus
from lm.errors import UserError

FORMAT = 3


def load_tokens(
    corpus: str,
    tokenizer: str | tokenizers.Tokenizer | None,
    *,
    val_fraction: float,
    test_fraction: float,
) -> shards.Corpus:
    """Open a corpus as token ids, tokenizing it first if necessary.

    A text is cut by characters: the first part trains, then comes validation, then test. Each part is tokenized by
    itself, so no token straddles a border. A prepared corpus has its own splits and tokenizer.

    Args:
        corpus: A name or path, see `corpora.find`, or the folder or URL of a prepared corpus.
        tokenizer: A name for `tokenizers.make`, or an existing tokenizer; None is a prepared corpus' own, or
            char.
        val_fraction: Share of a text's characters for validation.
        test_fraction: Share of a text's characters for testing.

    Raises:
        UserError: The corpus cannot be read, is empty, has symbols that the tokenizer lacks, or was prepared with
            another tokenizer.
    """
    corpus = corpus.removeprefix("file://")
    if remote.is_remote(corpus):
        origin = remote.Remote.open(corpus)
        return _checked(shards.open_corpus(origin.folder, origin), corpus, tokenizer)
    if corpus not in sources.NAMED and shards.is_prepared(Path(corpus).expanduser()):
        return _checked(shards.open_corpus(Path(corpus).expanduser()), corpus, tokenizer)
    tokenizer = tokenizer or "char"
    source = sources.find(corpus)
    kind = tokenizer if isinstance(tokenizer, str) else tokenizers.identity(tokenizer.state())
    if kind.endswith(".tiktoken") and Path(kind).expanduser().is_file():
        kind = storage.sha256(Path(kind).expanduser())
    key = tokenizers.identity(
        {"format": FORMAT, "corpus": source.fingerprint, "tokenizer": kind, "fractions": [val_fraction, test_fraction]}
    )
    folder = storage.tokens_home() / key[:32]
    if (opened := _open(folder)) is not None:
        return opened
    if note := sources.left_out(corpus):
        print(note, file=sys.stderr)
    text = source.read()
    if not text:
        raise UserError(f"corpus {corpus}: it is empty")
    if isinstance(tokenizer, str):
        tokenizer = tokenizers.make(tokenizer, lambda: text)
    first, second = int(len(text) * (1 - val_fraction - test_fraction)), int(len(text) * (1 - test_fraction))
    parts = {"train": text[:first], "val": text[first:second], "test": text[second:]}
    _write(folder, parts, tokenizer)
    return shards.open_corpus(folder)


def _checked(prepared: shards.Corpus, corpus: str, tokenizer: str | tokenizers.Tokenizer | None) -> shards.Corpus:
    """Return a prepared corpus after checking that its tokenizer is the requested one."""
    own = prepared.tokenizer.state()
    if tokenizer is None or (tokenizer == "char" and own["kind"] == "char"):
        return prepared
    wanted = tokenizers.make(tokenizer, str) if isinstance(tokenizer, str) else tokenizer
    if wanted.state() != own:
        raise UserError(
            f"corpus {corpus}: was prepared with a tokenizer of {prepared.tokenizer.n_vocab} ids, not the "
            + (f"data.tokenizer {tokenizer}" if isinstance(tokenizer, str) else "checkpoint's")
            + f" of {wanted.n_vocab}: prepare it with that one"
        )
    return prepared


def _write(folder: Path, parts: dict[str, str], tokenizer: tokenizers.Tokenizer) -> None:
    """Write a tokenized text atomically."""
    ids = {name: tokenizer.encode(text) for name, text in parts.items()}
    part = storage.part_of(folder)
    try:
        if os.path.lexists(folder) and _open(folder) is None:  # incomplete, after a full disk say
            storage.remove_folder(folder, FILES + PARTS)
        write_corpus(part, ids, tokenizer, sum(len(text.encode()) for text in parts.values()))
        os.rename(part, folder)
    except OSError as error:
        if _open(folder) is None:  # else another process was first, with the same content
            raise UserError(
                f"{folder.parent} could not be written to ({error.strerror}): make room, or set LM_DATA_HOME to "
                "another folder"
            ) from error
    finally:
        if part.exists():
            with suppress(OSError, UserError):
                storage.remove_folder(part, FILES + PARTS)


def _open(folder: Path) -> shards.Corpus | None:
    """Open what was tokenized before; None where there is nothing or it is incomplete: then it is made again."""
    try:
        opened = shards.open_corpus(folder)
        for tokens in opened.splits.values():
            for place in tokens.shards:
                place.check()
        return opened
    except UserError:
        return None
