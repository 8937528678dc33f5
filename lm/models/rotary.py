"""Rotary positions: Su et al., "RoFormer" (2021), laid out as in LLaMA and Hugging Face's models.

Shapes: T time, D channels of a head, … any leading dimensions.
"""

import torch
from torch import Tensor, nn

from lm.models.parts import Turn, in_parts_pay


class Rotary(nn.Module):
    """Rotates each pair of a head's channels by an angle that grows with the position.

    Channel i is paired with channel i + D/2, and at position t the pair is turned by t · theta^(-2i/D). The dot
    product of a rotated query and key depends only on their distance, and no length changes.

    Args:
        head_size: Channels of a head, D; even.
        block_size: Number of positions.
        theta: The base of the angles: the slowest pair turns by almost 1/theta per position.

    Raises:
        ValueError: head_size is odd, or theta is not positive.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, *, head_size: int, block_size: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_size % 2:
            raise ValueError(
                f"positions rotary turns pairs of channels, and n_embd / n_head is {head_size}: make it even"
            )
        if not theta > 0:
            raise ValueError(f"rope_theta is {theta}: it must be above 0; LLaMA has 10000")
        # every bit as Hugging Face's, which a negative exponent would not give
        frequencies = 1 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)  # (D/2,)
        angles = torch.outer(torch.arange(block_size, dtype=torch.float32), frequencies)  # (T,) × (D/2,) -> (T, D/2)
        angles = torch.cat([angles, angles], dim=1)  # (T, D/2) -> (T, D): both halves turn alike
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate x (…, T, D) as its positions (…, T) say, by default 0 to T - 1."""
        T = x.shape[-2]  # noqa: N806
        if positions is None and in_parts_pay(x):
            return Turn.apply(x, *self.angles(T))  # type: ignore[no-untyped-call]
        cos, sin = (self.cos[:T], self.sin[:T]) if positions is None else (self.cos[positions], self.sin[positions])
        first, second = x.chunk(2, dim=-1)  # (…, T, D) -> each (…, T, D/2)
        quarter = torch.cat([-second, first], dim=-1)  # (…, T, D): each pair turned by 90 degrees
        return (x * cos + quarter * sin).type_as(x)

    def angles(self, T: int) -> tuple[Tensor, Tensor]:  # noqa: N803
        """Return cosine and sine of each pair's angle at positions 0 to T - 1, (T, D/2)."""
        half = self.cos.shape[1] // 2
        return self.cos[:T, :half], self.sin[:T, :half]
