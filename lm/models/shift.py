"""Token shift: each channel reads a part of what it held one position earlier.

Peng et al., "RWKV" (2023), section 3.1. A layer then sees pairs of neighbours, for which attention needs a head.

Shapes: B batch, T time, C channels (n_embd).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models.cache import Cache


class TokenShift(nn.Module):
    """y_t = x_t + w (x_(t-1) - x_t), with a learned w for each channel; before the first position stand zeros."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the mean of a position and the one before."""
        nn.init.constant_(self.weight, 0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); a cache has what was read before x, and takes x."""
        return torch.lerp(x, earlier(x) if cache is None else cache.earlier(self, x), self.weight.to(x.dtype))


def earlier(x: Tensor) -> Tensor:
    """Return (B, T, C) moved by a position: zeros, then all of x but the last."""
    return F.pad(x, (0, 0, 1, -1))
