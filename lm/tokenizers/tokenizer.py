"""What every tokenizer can do, and decoding one text id by id."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from lm.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer can do."""

    n_vocab: int
    """Number of ids, V; every id is below it."""
    eot: int | None = None
    """Id of the end-of-text token, where there is one."""
    begins_with_eot: bool = False
    """Whether that token precedes every text in training, so that a prompt needs it too."""
    chat: dict[str, str] | None = None
    """How a conversation is written, where that is known: the chat_template of a tokenizer_config.json, and the tokens
    that it may name, bos_token and the like. `lm.tokenizers.templates` runs it."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (T,).

        Raises:
            UserError: The vocabulary lacks one of its symbols.
        """

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes that each id stands for; none for the end-of-text token."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return all that `from_state` needs to make the same ids: strings and lists of strings."""

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens by their names; text never becomes one of them, whatever is written in it."""
        there = self.eot is not None and not self._table[self.eot]
        return {END_OF_TEXT: self.eot} if there and self.eot is not None else {}

    @property
    def end_of_turn(self) -> int | None:
        """Id of the token that ends a turn of a conversation; the end-of-text token's where there is no other."""
        return self.special_ids.get((self.chat or {}).get("eos_token", ""), self.eot)

    @property
    def stops(self) -> set[int]:
        """Ids that end what a network writes: the end of a text, and of a turn."""
        return {i for i in (self.eot, self.end_of_turn) if i is not None}

    def with_special(self, names: Iterable[str]) -> "Tokenizer":
        """Return a tokenizer with an end-of-text token that no text contains, and after its ids these special tokens.

        Raises:
            UserError: It takes none.
        """
        raise UserError(f"{type(self).__name__} takes no special tokens: use char, byte or a byte-pair encoding")

    @cached_property
    def _table(self) -> list[bytes]:
        return self.token_bytes()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of ids; they may end inside a character.

        An id beyond the vocabulary stands for nothing: a network may have more of them, as a padded head has.
        """
        return b"".join(self._table[i] for i in ids if i < len(self._table))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decoder(self) -> "Decoder":
        """Return a decoder for one text, id by id."""
        return Decoder(self)

    @property
    def dtype(self) -> np.dtype:
        """The type of stored ids: the smaller of 16 and 32 bits, little-endian, that holds them."""
        return np.dtype("<u2" if self.n_vocab <= 1 << 16 else "<u4")


class Decoder:
    """Decodes one text id by id, and never breaks a character.

    Args:
        tokenizer: Gives the bytes of each id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def add(self, token: int) -> str:
        """Take an id; return the characters that are now whole."""
        return self._decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """Take the end of the text; return U+FFFD where it ended inside a character, else nothing."""
        return self._decode(b"", final=True)
