"""The merge table of a byte-pair encoding as text: a .tiktoken file."""

import base64
from collections.abc import Iterable


def to_text(ranks: dict[bytes, int]) -> str:
    """Return the text of a .tiktoken file: a line of base64 bytes and rank for each token, in order of rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered)


def free_ids(count: int, taken: Iterable[int]) -> list[int]:
    """Return the first ids, in order, that special tokens do not take."""
    taken = set(taken)
    return [i for i in range(count + len(taken)) if i not in taken][:count]


def from_text(text: str, taken: Iterable[int] = (), *, every_byte: bool = True) -> dict[bytes, int]:
    """Return the merge table that a .tiktoken file holds.

    Args:
        text: The file's.
        taken: Ids of special tokens, which are no ranks.
        every_byte: Whether each of the 256 single bytes must have a rank.

    Raises:
        ValueError: Its ranks are not 0, 1, 2, …, without those taken, or a single byte has none.
    """
    pairs = [line.split() for line in text.splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if not ranks or sorted(ranks.values()) != free_ids(len(pairs), taken):
        raise ValueError("ranks are not 0, 1, 2, …")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if every_byte and missing:
        raise ValueError(f"{len(missing)} of the 256 single bytes have no rank")
    return ranks
