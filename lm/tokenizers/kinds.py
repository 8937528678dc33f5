"""Which kinds of tokenizers there are: made by name, or of what a checkpoint or a prepared corpus holds."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lm import storage
from lm.errors import UserError
from lm.tokenizers.byte import ByteTokenizer
from lm.tokenizers.byte_pair import BytePairTokenizer
from lm.tokenizers.char import CharTokenizer
from lm.tokenizers.published import PUBLISHED
from lm.tokenizers.tokenizer import Tokenizer

KINDS: dict[str, Callable[..., Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "bytepair": BytePairTokenizer,
}

CHAT = "chat"
"""The key of a checkpoint's tokenizer that has its `Tokenizer.chat`; an older checkpoint has none."""


def to_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a checkpoint holds of a tokenizer."""
    return tokenizer.state() | ({CHAT: tokenizer.chat} if tokenizer.chat else {})


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a checkpoint or a prepared corpus holds."""
    arguments = {key: value for key, value in state.items() if key not in ("kind", CHAT)}
    tokenizer = KINDS[state["kind"]](**arguments)
    tokenizer.chat = state.get(CHAT)
    return tokenizer


def identity(state: dict[str, Any]) -> str:
    """Return a hash that is the same for tokenizers that give the same ids."""
    ids = {key: value for key, value in state.items() if key != CHAT}
    return hashlib.sha256(repr(sorted(ids.items())).encode()).hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer that a prepared corpus holds as JSON.

    Raises:
        UserError: The file is missing, or holds no tokenizer.
    """
    try:
        state = json.loads(storage.plain(path).read_text())
        tokenizer = from_state(state)
        if tokenizer.state() != state:
            raise ValueError("it does not give back what it was made from")
        return tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer ({error or type(error).__name__})") from error


def make(name: str, symbols: Callable[[], Iterable[str]], *, documents: bool = False) -> Tokenizer:
    """Return the tokenizer with that name: `char`, `byte`, a published encoding, or the path of a .tiktoken file.

    Args:
        name: Which one.
        symbols: Returns the corpus' characters, `char`'s vocabulary.
        documents: Whether it must have an end-of-text token.
    """
    if name == "char":
        return CharTokenizer(symbols(), end_of_text=documents)
    if name == "byte":
        return ByteTokenizer()
    if name in PUBLISHED:
        encoding = PUBLISHED[name]
        return BytePairTokenizer(encoding.ranks(), encoding.pattern, encoding.special)
    path = Path(name).expanduser()
    if path.suffix == ".tiktoken" and not path.exists():
        raise UserError(f"tokenizer {name}: there is no such file; lm tokenizer makes one")
    if path.suffix == ".tiktoken" and path.is_file():
        try:
            return BytePairTokenizer(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"tokenizer {name}: not a .tiktoken file, which is text ({error.reason})") from error
    raise UserError(f"tokenizer {name}: neither char, byte, {', '.join(PUBLISHED)} nor the path of a .tiktoken file")
