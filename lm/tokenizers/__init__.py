"""Tokenizers: text to token ids and back. They are saved as plain strings, never pickled.

To add one, write a subclass of `Tokenizer` and add it to KINDS.
"""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm import storage
from lm.errors import UserError
from lm.tokenizers import merges as published
from lm.tokenizers.merges import END_OF_TEXT, GPT2_PATTERN, PUBLISHED

if TYPE_CHECKING:
    import tiktoken


class Tokenizer(ABC):
    """What every tokenizer can do."""

    n_vocab: int
    """Number of ids, V; every id is below it."""
    eot: int | None = None
    """Id of the end-of-text token, where there is one."""
    begins_with_eot: bool = False
    """Whether that token precedes every text in training, so that a prompt needs it too."""

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
        """Return all that `from_state` needs to make an equal tokenizer: strings and lists of strings."""

    @cached_property
    def _table(self) -> list[bytes]:
        return self.token_bytes()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of ids; they may end inside a character."""
        return b"".join(self._table[i] for i in ids)

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


class CharTokenizer(Tokenizer):
    """One id per character, in the order of their code points.

    A symbol that the vocabulary lacks is an error that names it: it is never dropped, nor taken for another.

    Args:
        symbols: The characters that it knows.
        end: One more character, which stands before and after each text and gets id 0.
        end_of_text: Whether there is an end-of-text token, which is not a character; it gets the last id.
    """

    def __init__(self, symbols: Iterable[str], end: str | None = None, end_of_text: bool = False) -> None:
        known = set(symbols)
        self.end = end
        if end is not None:
            self.eot, self.begins_with_eot = 0, True
            known.discard(end)
        self.symbols = ([] if end is None else [end]) + sorted(known)
        self.n_vocab = len(self.symbols)
        if end_of_text:
            self.eot, self.n_vocab = self.n_vocab, self.n_vocab + 1
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
            raise UserError(f"the vocabulary of {len(self.symbols)} characters lacks {listed}")
        return self._order[places]

    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes of each symbol."""
        return [symbol.encode() for symbol in self.symbols] + [b""] * (self.n_vocab - len(self.symbols))

    def state(self) -> dict[str, Any]:
        """Return the symbols, and the end mark or end-of-text token where there is one."""
        ends: dict[str, Any] = {"end": self.end} if self.end else {}
        if self.n_vocab > len(self.symbols):
            ends["end_of_text"] = True
        return {"kind": "char", "symbols": "".join(self.symbols)} | ends


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
            return published.from_text(self.ranks, self.special_ids.values(), every_byte=every)
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

    def state(self) -> dict[str, Any]:
        """Return the merge table, the pattern, and the special tokens where they are not the default."""
        special: dict[str, Any] = {} if self.special is None else {"special": self.special}
        if self.end_of_text != END_OF_TEXT:
            special["end_of_text"] = self.end_of_text
        return {"kind": "bytepair", "ranks": self.ranks, "pattern": self.pattern} | special


KINDS: dict[str, Callable[..., Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "bytepair": BytePairTokenizer,
}


def well_formed(text: str) -> str:
    """Return a text with U+FFFD for lone surrogates, which UTF-8 cannot encode; tiktoken does the same."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a checkpoint or a prepared corpus holds."""
    arguments = {key: value for key, value in state.items() if key != "kind"}
    return KINDS[state["kind"]](**arguments)


def identity(state: dict[str, Any]) -> str:
    """Return a hash that is the same for equal tokenizers."""
    return hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()


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
    if path.suffix == ".tiktoken" and path.is_file():
        try:
            return BytePairTokenizer(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"tokenizer {name}: not a .tiktoken file, which is text ({error.reason})") from error
    raise UserError(f"tokenizer {name}: neither char, byte, {', '.join(PUBLISHED)} nor the path of a .tiktoken file")
