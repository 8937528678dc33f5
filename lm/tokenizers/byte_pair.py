"""A byte-level byte-pair encoding."""

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.errors import UserError
from lm.tokenizers import merges
from lm.tokenizers.byte import well_formed
from lm.tokenizers.published import GPT2_PATTERN
from lm.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    import tiktoken


class BytePairTokenizer(Tokenizer):
    """A byte-level byte-pair encoding, run by tiktoken.

    The merge table is parsed on first use, so that opening a tokenized corpus costs nothing.

    Args:
        ranks: The merge table, lines of base64 bytes and rank: the contents of a .tiktoken file.
        pattern: The regular expression that cuts text into words; GPT-2's by default.
        special: Ids of the special tokens, which may come before those of the merge table; by default the end-of-text
            token alone, after the last merge.
        end_of_text: The name of the end-of-text token, if it is among the special ones.
    """

    def __init__(
        self,
        ranks: str,
        pattern: str = GPT2_PATTERN,
        special: dict[str, int] | None = None,
        end_of_text: str = END_OF_TEXT,
    ) -> None:
        self.ranks, self.pattern, self.special, self.end_of_text = ranks, pattern, special, end_of_text
        self.n_vocab = sum(1 for line in ranks.splitlines() if line)
        self.special_ids = {end_of_text: self.n_vocab} if special is None else special
        self.eot = self.special_ids.get(end_of_text)
        for taken in sorted(self.special_ids.values()):  # one within the merge table moves the ids after it up
            self.n_vocab = max(self.n_vocab, taken) + 1

    @cached_property
    def merge_table(self) -> dict[bytes, int]:
        """The parsed merge table; raises UserError where a line is malformed."""
        try:
            every = self.special is None  # those of other programs may lack bytes that their corpus had not
            return merges.from_text(self.ranks, self.special_ids.values(), every_byte=every)
        except ValueError as error:
            raise UserError(f"not a .tiktoken file, whose lines are base64 bytes and a rank ({error})") from error

    @cached_property
    def _no_ids(self) -> set[int]:
        """The single bytes that are no tokens; tiktoken would end the process."""
        return {byte for byte in range(256) if bytes([byte]) not in self.merge_table}

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        # only lm itself adds special tokens; an encoding without them takes no text for one
        return tiktoken.Encoding("lm", pat_str=self.pattern, mergeable_ranks=self.merge_table, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (T,); the characters `<|endoftext|>` in it are ordinary ones."""
        if self._no_ids and (unknown := sorted(self._no_ids.intersection(well_formed(text).encode()))):
            raise UserError(f"the vocabulary lacks the byte {', '.join(f'0x{byte:02x}' for byte in unknown)}")
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token; none for special ones and unused ids."""
        table = [b""] * self.n_vocab
        for token, rank in self.merge_table.items():
            table[rank] = token
        return table

    def with_special(self, names: Iterable[str]) -> "BytePairTokenizer":
        """Return one with these special tokens after the last id."""
        new = [name for name in (self.end_of_text, *names) if name not in self.special_ids]
        special = {**self.special_ids, **{name: i for i, name in enumerate(new, self.n_vocab)}}
        return BytePairTokenizer(self.ranks, self.pattern, special, self.end_of_text)

    def state(self) -> dict[str, Any]:
        """Return the merge table, the pattern, and the special tokens where they are not the default."""
        special: dict[str, Any] = {} if self.special is None else {"special": self.special}
        if self.end_of_text != END_OF_TEXT:
            special["end_of_text"] = self.end_of_text
        return {"kind": "bytepair", "ranks": self.ranks, "pattern": self.pattern} | special
