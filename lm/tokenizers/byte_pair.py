"""A byte-level byte-pair encoding."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.errors import UserError
from lm.tokenizers import merges
from lm.tokenizers.published import END_OF_TEXT, GPT2_PATTERN
from lm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tiktoken


class BytePairTokenizer(Tokenizer):
    """A byte-level byte-pair encoding, run by tiktoken.

    The merge table is parsed on first use, so that opening a tokenized corpus costs nothing.

    Args:
        ranks: The merge table, lines of base64 bytes and rank: the contents of a .tiktoken file.
        pattern: The regular expression that cuts text into words; GPT-2's by default.
        special: Ids of the special tokens, `<|endoftext|>` among them; by default that one alone, after the last merge.
    """

    def __init__(self, ranks: str, pattern: str = GPT2_PATTERN, special: dict[str, int] | None = None) -> None:
        self.ranks, self.pattern, self.special = ranks, pattern, special
        ids = special or {END_OF_TEXT: sum(1 for line in ranks.splitlines() if line)}
        self.eot = ids[END_OF_TEXT]
        self.n_vocab = max(ids.values()) + 1

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """The parsed merge table; raises UserError where a line is malformed."""
        try:
            return merges.from_text(self.ranks)
        except ValueError as error:
            raise UserError(f"not a .tiktoken file, whose lines are base64 bytes and a rank ({error})") from error

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        # only lm itself adds special tokens; an encoding without them takes no text for one
        return tiktoken.Encoding("lm", pat_str=self.pattern, mergeable_ranks=self._ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (T,); the characters `<|endoftext|>` in it are ordinary ones."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token; none for special ones and unused ids."""
        table = sorted(self._ranks, key=self._ranks.__getitem__)
        return table + [b""] * (self.n_vocab - len(table))

    def state(self) -> dict[str, Any]:
        """Return the merge table, the pattern, and the special tokens where they are not the default."""
        special = {"special": self.special} if self.special else {}
        return {"kind": "bytepair", "ranks": self.ranks, "pattern": self.pattern} | special
