"""Attention masks: which earlier positions a position may attend to.

Shapes: B batch, T queries, S keys, of which the queries are the last.
"""

import torch
from torch import Tensor


def past(T: int, S: int, device: torch.device) -> Tensor:  # noqa: N803
    """Return the causal mask, bool (T, S), of the last T of S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def same_document(tokens: Tensor, document_end: int) -> Tensor:
    """Return the attention mask, bool (B, 1, T, T): each position may see itself and its own document's past.

    Args:
        tokens: int64 (B, T).
        document_end: The token that ends a document, and is its last.
    """
    ends = tokens == document_end
    document = ends.cumsum(1) - ends.long()  # (B, T): how many documents ended before
    same = document[:, :, None] == document[:, None, :]  # (B, T, T)
    return same.tril()[:, None]
