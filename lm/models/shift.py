"""Token shift: each channel reads a part of what it held one position earlier.

Peng et al., "RWKV" (2023), section 3.1. A layer then sees pairs of neighbours, for which attention needs a head.

Shapes: B batch, T time, C channels (n_embd).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models.cache import Cache
from lm.models.masks import sees_previous


class TokenShift(nn.Module):
    """y_t = x_t + w (x_(t-1) - x_t), with a learned w for each channel; before a document's beginning stand zeros."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the mean of a position and the one before."""
        nn.init.constant_(self.weight, 0.5)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C); what else it takes is what attention takes.

        Args:
            x: (B, T, C).
            mask: Attention's, bool (B, 1, T, T): what a position may not see is zero here. With a cache, that knows.
            positions: Where they are; not used.
            cache: Has what was read before x, and takes x.
        """
        before = earlier(x, mask) if cache is None else cache.earlier(self, x)
        return torch.lerp(x, before, self.weight.to(x.dtype))


def earlier(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return (B, T, C) moved by a position: zeros, then all of x but the last; zeros where a mask hides it, too."""
    return seen(F.pad(x, (0, 0, 1, -1)), mask)


def seen(before: Tensor, mask: Tensor | None) -> Tensor:
    """Return what stands before each position (B, T, C), zeros where a mask (B, 1, T, T) hides it."""
    return before if mask is None else before.masked_fill(~sees_previous(mask)[..., None], 0.0)  # (B, T, 1)
