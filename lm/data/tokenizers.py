"""Tokenizers: text to token ids and back. They are saved as plain strings, never pickled.

To add one, write a subclass of `Tokenizer` and enter it in KINDS.
"""

import base64
import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.data import files
from lm.errors import UserError

if TYPE_CHECKING:
    import tiktoken

RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer can do."""

    n_vocab: int
    """Number of ids, V; every id is below it."""
    eot: int | None = None
    """Id of the end-of-text token, where there is one."""
    begins_with_eot: bool = False
    """Whether every text was trained on after that token, so that a prompt follows it too."""

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


class CharTokenizer(Tokenizer):
    """One id a character, in the order of their code points.

    Args:
        symbols: The characters that it knows.
        end: One more, that stands before and after each text and gets id 0.
    """

    def __init__(self, symbols: Iterable[str], end: str | None = None) -> None:
        known = set(symbols)
        self.end = end
        if end is not None:
            self.eot, self.begins_with_eot = 0, True
            known.discard(end)
        self.symbols = ([] if end is None else [end]) + sorted(known)
        self.n_vocab = len(self.symbols)
        points = np.array([ord(symbol) for symbol in self.symbols], dtype=np.uint32)
        self._order = np.argsort(points)  # the end mark may be out of order
        self._points = points[self._order]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (T,). A symbol that the vocabulary lacks is an error that names it."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self._points, points), self.n_vocab - 1)
        known = self._points[places] == points
        if not known.all():
            unknown = sorted({chr(point) for point in np.unique(points[~known])})
            listed = ", ".join(map(repr, unknown[:10])) + (
                f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            )
            raise UserError(f"the vocabulary of {self.n_vocab} characters lacks {listed}")
        return self._order[places]

    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes of each symbol."""
        return [symbol.encode() for symbol in self.symbols]

    def state(self) -> dict[str, Any]:
        """Return the symbols, and the end mark where there is one."""
        return {"kind": "char", "symbols": "".join(self.symbols)} | ({"end": self.end} if self.end else {})


class BytePairTokenizer(Tokenizer):
    """A byte-level byte-pair encoding, run by tiktoken; the last id is the end-of-text token.

    The ranks are parsed when they are first needed, so that opening a tokenized corpus costs nothing.

    Args:
        ranks: Lines of base64 bytes and rank, the contents of a .tiktoken file.
        pattern: The regular expression that cuts text into words; GPT-2's by default.
    """

    def __init__(self, ranks: str, pattern: str = GPT2_PATTERN) -> None:
        self.ranks, self.pattern = ranks, pattern
        self.eot = sum(1 for line in ranks.splitlines() if line)
        self.n_vocab = self.eot + 1

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """The parsed ranks; raises UserError where a line is not of their form."""
        try:
            pairs = [line.split() for line in self.ranks.splitlines() if line]
            table = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            if not table or sorted(table.values()) != list(range(self.eot or 0)):
                raise ValueError("ranks are not 0, 1, 2, …")
            if missing := [byte for byte in range(256) if bytes([byte]) not in table]:
                raise ValueError(f"{len(missing)} of the 256 single bytes have no rank")
        except ValueError as error:
            raise UserError(f"not a .tiktoken file, whose lines are base64 bytes and a rank ({error})") from error
        return table

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        special = {END_OF_TEXT: self.n_vocab - 1}
        return tiktoken.Encoding("lm", pat_str=self.pattern, mergeable_ranks=self._ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 (T,); the characters `<|endoftext|>` in it are ordinary ones."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token."""
        return [*sorted(self._ranks, key=self._ranks.__getitem__), b""]

    def state(self) -> dict[str, Any]:
        """Return the ranks and the pattern."""
        return {"kind": "bytepair", "ranks": self.ranks, "pattern": self.pattern}


KINDS: dict[str, Callable[..., Tokenizer]] = {"char": CharTokenizer, "bytepair": BytePairTokenizer}


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a checkpoint or a prepared corpus holds."""
    arguments = {key: value for key, value in state.items() if key != "kind"}
    return KINDS[state["kind"]](**arguments)


def identity(state: dict[str, Any]) -> str:
    """Return a hash that is the same for equal tokenizers."""
    return hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()


def make(name: str, read: Callable[[], str]) -> Tokenizer:
    """Return the tokenizer of a name: `char`, `gpt2`, or the path of a .tiktoken file.

    Args:
        name: Which one.
        read: Reads the corpus, whose symbols are `char`'s vocabulary.
    """
    if name == "char":
        return CharTokenizer(read())
    if name == "gpt2":
        return BytePairTokenizer(gpt2_ranks())
    path = Path(name).expanduser()
    if path.suffix == ".tiktoken" and path.is_file():
        try:
            return BytePairTokenizer(path.read_text())
        except UnicodeDecodeError as error:
            raise UserError(f"tokenizer {name}: not a .tiktoken file, which is text ({error.reason})") from error
    raise UserError(f"tokenizer {name}: neither char, gpt2 nor the path of a .tiktoken file")


def gpt2_ranks() -> str:
    """Return GPT-2's 50,256 ranks from the data folder, tiktoken's cache, or a download with a timeout.

    tiktoken itself would ask the network without a timeout, so it is only asked for what its cache surely has.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
    cached = cache / hashlib.sha1(RANKS_URL.encode()).hexdigest()
    if cached.is_file() and files.sha256(cached) == RANKS_SHA256:
        return cached.read_text()
    return _ranks_from_pair(cache) or files.fetch("gpt2.tiktoken", RANKS_URL, RANKS_SHA256).read_text()


def _ranks_from_pair(cache: Path) -> str | None:
    """Return the ranks from the vocab.bpe and encoder.json that tiktoken's own `gpt2` leaves in its cache."""
    pair = {
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    if not all((cache / name).is_file() and files.sha256(cache / name) == digest for name, digest in pair.items()):
        return None
    from tiktoken_ext.openai_public import gpt2

    ranks = sorted(gpt2()["mergeable_ranks"].items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)
