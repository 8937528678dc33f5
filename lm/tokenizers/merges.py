"""The merge table of a byte-pair encoding as text: a .tiktoken file."""

import base64


def to_text(ranks: dict[bytes, int]) -> str:
    """Return the text of a .tiktoken file: a line of base64 bytes and rank for each token, in order of rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered)


def from_text(text: str) -> dict[bytes, int]:
    """Return the merge table that a .tiktoken file holds.

    Raises:
        ValueError: Its ranks are not 0, 1, 2, …, or one of the 256 single bytes has none.
    """
    pairs = [line.split() for line in text.splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if not ranks or sorted(ranks.values()) != list(range(len(pairs))):
        raise ValueError("ranks are not 0, 1, 2, …")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} of the 256 single bytes have no rank")
    return ranks
