"""Attention masks: which earlier positions a position may attend to.

Shapes: B batch, T queries, S keys, of which the queries are the last.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def past(T: int, S: int, device: torch.device) -> Tensor:  # noqa: N803
    """Return the causal mask, bool (T, S), of the last T of S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def same_document(tokens: Tensor, document_end: int, last: int | None = None) -> Tensor:
    """Return the attention mask, bool (B, 1, T, S): each position may see itself and its own document's past.

    Args:
        tokens: int64 (B, S).
        document_end: The token that ends a document, and is its last.
        last: Of how many of the last positions, T; all by default.
    """
    S = tokens.shape[1]  # noqa: N806
    T = S if last is None else last  # noqa: N806
    ends = tokens == document_end
    document = ends.cumsum(1) - ends.long()  # (B, S): how many documents ended before
    same = document[:, S - T :, None] == document[:, None, :]  # (B, T, S)
    return same.tril(S - T)[:, None]


def sees_previous(mask: Tensor) -> Tensor:
    """Return whether each position may see the one before it, bool (B, T), of a mask (B, 1, T, T)."""
    return F.pad(mask[:, 0].diagonal(-1, 1, 2), (1, 0))  # (B, T - 1) -> (B, T)
