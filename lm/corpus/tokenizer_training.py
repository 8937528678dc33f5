"""Training a byte-level byte-pair encoding on a corpus.

The `tokenizers` library learns the merges; they are written as a .tiktoken file, which tiktoken runs.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lm import bounds, outputs, storage
from lm.corpus import formats, source_files
from lm.errors import UserError, setting
from lm.tokenizers import BytePairTokenizer
from lm.tokenizers.huggingface import byte_table
from lm.tokenizers.merges import from_text, to_text

SHORT = re.compile(r"(?s).{1,4096}(?:(?<=[^\W\d_])(?=\n)|\Z)|.{1,8192}")  # ends at the end of a word, if there is one
SAMPLE = 32 << 20  # characters on which bytes per token are counted


def train(
    source: list[str], vocab_size: int, output: Path, settings: formats.Settings, *, overwrite: bool = False
) -> dict[str, float]:
    """Train an encoding and write it.

    Args:
        source: Files, folders or globs.
        vocab_size: Number of tokens with the 256 bytes; the end-of-text token comes in addition.
        output: The .tiktoken file, a new one.
        settings: How text is read.
        overwrite: Whether it may replace another .tiktoken file.

    Returns:
        vocab_size, and bytes_per_token over (the first 32 Mi characters of) the corpus.

    Raises:
        UserError: The source is too small for so many tokens or cannot be read, or the output cannot be written.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bounds.check({"vocab_size": vocab_size}, "tokenizer", "", UserError)
    outputs.check_free(output, made=".tiktoken file", ours=_is_table, overwrite=overwrite)
    if output.suffix != ".tiktoken":
        raise UserError(f"{setting('output')} {output}: say a name that ends in .tiktoken")
    paths = source_files.find(source, settings.unread)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts words by GPT-2's pattern
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(batches(paths, settings), trainer)
    table = byte_table()
    ranks = {bytes(table[character] for character in token): rank for token, rank in tokenizer.get_vocab().items()}
    if len(ranks) < vocab_size:
        raise UserError(
            f"{setting('vocab_size')} {vocab_size}: the source has pairs for {len(ranks)} tokens: say fewer, or more "
            "text"
        )
    text = to_text(ranks)
    bytes_per_token = measure(BytePairTokenizer(text), texts(paths, settings))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(output, text.encode())
    except OSError as error:
        raise UserError(f"{setting('output')} {output}: could not be written ({error.strerror})") from error
    return {"vocab_size": len(ranks), "bytes_per_token": round(bytes_per_token, 4)}


def _is_table(path: Path) -> bool:
    """Return whether a file is a .tiktoken file."""
    with suppress(OSError, ValueError):
        return bool(from_text(path.read_text()))
    return False


def texts(paths: list[Path], settings: formats.Settings) -> Iterator[str]:
    """Yield all text of files, in documents, or pieces of long ones."""
    for path in paths:
        reader = formats.reader_of(path, settings)
        with formats.opened(path) as (file, _):
            if reader is not None:
                yield from reader(file, str(path), settings)
            else:
                yield from formats.pieces(formats.text_blocks(file, str(path), settings))


def batches(paths: list[Path], settings: formats.Settings) -> Iterator[list[str]]:
    """Yield all text of files in lists of short pieces, which `tokenizers` counts in parallel."""
    batch: list[str] = []
    for text in texts(paths, settings):
        for lines in SHORT.findall(text):
            batch.append(lines)
            if len(batch) == 1000:
                yield batch
                batch = []
    yield batch


def measure(tokenizer: BytePairTokenizer, corpus: Iterator[str]) -> float:
    """Return how many bytes of UTF-8 a token stands for, over the beginning of a corpus."""
    read = tokens = size = 0
    for text in corpus:
        read, tokens, size = read + len(text), tokens + len(tokenizer.encode(text)), size + len(text.encode())
        if read >= SAMPLE:
            break
    return size / max(1, tokens)
