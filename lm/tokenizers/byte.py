"""A tokenizer with one id per byte."""

from typing import Any

import numpy as np

from lm.tokenizers.tokenizer import Tokenizer


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8, and the end-of-text token after them."""

    n_vocab, eot = 257, 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text, int64 (T,)."""
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(np.int64)

    def token_bytes(self) -> list[bytes]:
        """Return each byte."""
        return [bytes([i]) for i in range(256)] + [b""]

    def state(self) -> dict[str, Any]:
        """Return its kind, which is all there is."""
        return {"kind": "byte"}


def well_formed(text: str) -> str:
    """Return a text with U+FFFD for lone surrogates, which UTF-8 cannot encode; tiktoken does the same."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
