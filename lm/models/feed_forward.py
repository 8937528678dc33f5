"""Position-wise feed-forward networks, the computing half of a block.

Shapes: B batch, T time, C channels (n_embd), M hidden channels (hidden_size).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models.dropout import Dropout
from lm.models.parts import GELUTanh, in_parts_pay

FeedForward = Literal["gelu", "gelu_erf", "relu", "relu_squared", "swiglu", "single", "none"]
ONE_THREAD, VECTORS = 16384, 64
"""Most elements that torch gives to a single thread; whole vectors of processors, in elements."""


def activated(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return f(x), x (B, T, M); where T is 1, as in generation, no text's bits depend on how many there are.

    Each thread gets a part of all elements, and computes the last ones of it, which fill no vector, by other
    instructions: they are rounded otherwise. Where parts may end so, a call gets no more rows than one thread takes.
    """
    if x.shape[1] > 1 or torch.is_grad_enabled():
        return f(x)
    threads = min(torch.get_num_threads(), -(-x.numel() // ONE_THREAD))
    if x.shape[2] % VECTORS == 0 and all(x.numel() % (VECTORS * n) == 0 for n in range(1, threads + 1)):
        return f(x)
    rows = max(1, ONE_THREAD // x.shape[2]) if x.shape[2] % VECTORS == 0 else 1
    return torch.cat([f(part) for part in x.split(rows)])


class ReLUSquared(nn.Module):
    """max(0, x)², So et al., "Primer" (2021)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return F.relu(x).square()


class GELU(nn.GELU):
    """torch's; by tanh, trained on a CPU, in half of its time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        if self.approximate == "tanh" and in_parts_pay(x):
            return GELUTanh.apply(x)  # type: ignore[no-untyped-call]
        return super().forward(x)


class BlockMLP(nn.Module):
    """Out to the hidden width, an activation, and back."""

    def __init__(self, *, n_embd: int, hidden_size: int, activation: nn.Module, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, hidden_size, bias=bias)
        self.activation = activation
        self.c_proj = nn.Linear(hidden_size, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        hidden = activated(self.activation, self.c_fc(x))  # (B, T, C) -> (B, T, M)
        return self.dropout(self.c_proj(hidden))  # (B, T, M) -> (B, T, C)


class SwiGLU(nn.Module):
    """An MLP whose hidden channels are gated by a second projection: Shazeer, "GLU Variants" (2020)."""

    def __init__(self, *, n_embd: int, hidden_size: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.w_gate = nn.Linear(n_embd, hidden_size, bias=bias)
        self.w_up = nn.Linear(n_embd, hidden_size, bias=bias)
        self.c_proj = nn.Linear(hidden_size, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        hidden = activated(F.silu, self.w_gate(x)) * self.w_up(x)  # (B, T, C) -> (B, T, M)
        return self.dropout(self.c_proj(hidden))  # (B, T, M) -> (B, T, C)


class SingleLayer(nn.Module):
    """One linear layer and a ReLU, the smallest thing that computes at a position."""

    def __init__(self, *, n_embd: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(torch.relu(self.c_fc(x)))


def make_feed_forward(
    kind: FeedForward, *, n_embd: int, hidden_size: int | None, dropout: float, bias: bool
) -> nn.Module | None:
    """Return the feed-forward network of a kind, None for "none".

    Raises:
        ValueError: hidden_size is not positive, or the kind has no hidden channels.
    """
    if kind in ("single", "none"):
        if hidden_size is not None:
            raise ValueError(f"hidden_size {hidden_size} with feed_forward {kind}: it has no inner width; drop one")
        return SingleLayer(n_embd=n_embd, dropout=dropout, bias=bias) if kind == "single" else None
    if hidden_size is not None and hidden_size < 1:
        raise ValueError(f"hidden_size is {hidden_size}: it must be at least 1, or null for the default")
    if kind == "swiglu":
        hidden_size = hidden_size or -(-(8 * n_embd // 3) // 8) * 8  # three matrices have as many weights as two of 4C
        return SwiGLU(n_embd=n_embd, hidden_size=hidden_size, dropout=dropout, bias=bias)
    gelu = GELU(approximate="tanh")
    activations = {"gelu": gelu, "gelu_erf": nn.GELU(), "relu": nn.ReLU(), "relu_squared": ReLUSquared()}
    hidden_size = hidden_size or 4 * n_embd
    return BlockMLP(n_embd=n_embd, hidden_size=hidden_size, activation=activations[kind], dropout=dropout, bias=bias)
