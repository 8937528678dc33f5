"""Dropout whose masks cost little: Srivastava et al., "Dropout" (2014).

torch draws a number for each element, on one core: on CPUs that is most of a step with dropout. Here they are drawn in
bulk, 64 random bits for four elements, from the same generator, so that a run resumes to the bit.
"""

import torch
from torch import Tensor, nn

LEVELS = 1 << 16  # of a probability: 16 bits an element


class Dropout(nn.Dropout):
    """Sets elements to 0 with probability p and multiplies the others by 1 / (1 - p), in training only.

    Args:
        p: Probability, to one in 65,536.
        rows: Whether a row, all of the last dimension, is dropped or kept as a whole. Of attention's values, that drops
            a key for all queries of its head.
    """

    def __init__(self, p: float, *, rows: bool = False) -> None:
        super().__init__(p)
        self.rows = rows

    def mask(self, x: Tensor) -> Tensor | None:
        """Return what to multiply x by, of its type: (…, C), or (…, 1) of rows; None where nothing is dropped."""
        if not self.training or self.p == 0:
            return None
        size = (*x.shape[:-1], 1) if self.rows else x.shape
        mask = x.new_empty(size)
        if x.device.type == "cpu":
            count = mask.numel()
            bits = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-count // 4),), device=x.device)  # of four elements
            least = min(round(self.p * LEVELS), LEVELS - 1) - LEVELS // 2
            torch.ge(bits.view(torch.int16)[:count].view(size), least, out=mask)
        else:
            mask.bernoulli_(1 - self.p)
        return mask.mul_(1 / (1 - self.p))

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        mask = self.mask(x)
        return x if mask is None else x * mask
