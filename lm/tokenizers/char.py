"""A tokenizer with one id per character."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer


class CharTokenizer(Tokenizer):
    """One id per character, in the order of their code points.

    A symbol that the vocabulary lacks is an error that names it: it is never dropped, nor taken for another.

    Args:
        symbols: The characters that it knows.
        end: One more character, which stands before and after each text and gets id 0.
        end_of_text: Whether there is an end-of-text token, which is no character; it gets the id after the last one.
        special: Names of further special tokens; they get the last ids.
    """

    advice = "take a text without, or a tokenizer that has them"
    """What helps where a text has other symbols."""

    def __init__(
        self, symbols: Iterable[str], end: str | None = None, end_of_text: bool = False, special: Iterable[str] = ()
    ) -> None:
        known = set(symbols)
        self.end = end
        if end is not None:
            self.eot, self.begins_with_eot = 0, True
            known.discard(end)
        self.symbols = ([] if end is None else [end]) + sorted(known)
        self.special = list(special)
        names = [END_OF_TEXT] * end_of_text + self.special
        self.special_ids = {name: i for i, name in enumerate(names, len(self.symbols))}
        self.n_vocab = len(self.symbols) + len(names)
        self.eot = self.special_ids.get(END_OF_TEXT, self.eot)
        points = np.array([ord(symbol) for symbol in self.symbols], dtype=np.uint32)
        self._order = np.argsort(points)  # the end mark may be out of order
        self._points = points[self._order]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (T,). A symbol that the vocabulary lacks is an error that names it."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        known = self._points[places] == points
        if not known.all():
            unknown = sorted({chr(point) for point in np.unique(points[~known])})
            listed = ", ".join(map(repr, unknown[:10])) + (
                f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            )
            raise UserError(f"the vocabulary of {len(self.symbols)} characters lacks {listed}: {self.advice}")
        return self._order[places]

    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes of each symbol."""
        return [symbol.encode() for symbol in self.symbols] + [b""] * (self.n_vocab - len(self.symbols))

    def with_special(self, names: Iterable[str]) -> "CharTokenizer":
        """Return one with these special tokens; an end mark, which a text may contain, becomes a symbol like others."""
        return CharTokenizer(self.symbols, end_of_text=True, special=[*self.special, *names])

    def state(self) -> dict[str, Any]:
        """Return the symbols, and the end mark, end-of-text token and special tokens where there are any."""
        ends: dict[str, Any] = {"end": self.end} if self.end else {}
        if END_OF_TEXT in self.special_ids:
            ends["end_of_text"] = True
        if self.special:
            ends["special"] = self.special
        return {"kind": "char", "symbols": "".join(self.symbols)} | ends
