"""A tokenizer with one id per byte."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8, and the end-of-text token after them.

    Args:
        special: Names of further special tokens; they get the last ids.
    """

    eot = 256

    def __init__(self, special: Iterable[str] = ()) -> None:
        self.special = list(special)
        self.special_ids = {name: i for i, name in enumerate([END_OF_TEXT, *self.special], self.eot)}
        self.n_vocab = self.eot + len(self.special_ids)

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text, int64 (T,)."""
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(np.int64)

    def token_bytes(self) -> list[bytes]:
        """Return each byte."""
        return [bytes([i]) for i in range(256)] + [b""] * len(self.special_ids)

    def with_special(self, names: Iterable[str]) -> "ByteTokenizer":
        """Return one with these special tokens."""
        return ByteTokenizer([*self.special, *names])

    def state(self) -> dict[str, Any]:
        """Return its kind, and the special tokens where there are any."""
        return {"kind": "byte"} | ({"special": self.special} if self.special else {})


def well_formed(text: str) -> str:
    """Return a text with U+FFFD for lone surrogates, which UTF-8 cannot encode; tiktoken does the same."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
