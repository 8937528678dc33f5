"""The loss of a split: a sum over tokens, divided by the tokens, over all batches and ranks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Sums(Metric):
    """Sums over a whole split, divided only at the end."""

    full_state_update = False
    names: tuple[str, ...]
    """Of the means."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Sums":
        """Move to the module's device, but not to its dtype: under bf16-true, sums would have three digits."""
        super()._apply(lambda state: state.to(fn(state).device), *args, **kwargs)
        return self


class TokenLoss(Sums):
    """Sums of nats, tokens and bytes; divided only at the end, so that no batch or rank weighs more than its tokens."""

    names = ("loss", "perplexity", "bits_per_byte")
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=wide()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor | int, text_bytes: Tensor | int = 0) -> None:
        """Add a batch: its summed cross-entropy in nats, its number of targets, and the bytes that these stand for."""
        self.nats += nats
        self.tokens += tokens
        self.bytes += text_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return loss (nats per token), perplexity, bits_per_byte of tokens that stand for text, and tokens."""
        loss = self.nats / self.tokens
        bits = {"bits_per_byte": self.nats / math.log(2) / self.bytes} if self.bytes else {}
        return {"loss": loss, "perplexity": loss.exp(), **bits, "tokens": self.tokens}


class PairLoss(Sums):
    """Sums over pairs of which one is preferred."""

    names = ("loss", "accuracy", "margin")
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=wide()), dist_reduce_fx="sum")

    def update(self, losses: Tensor, margins: Tensor) -> None:
        """Add pairs: their losses, and by how much the preferred one's score is larger, both (B,)."""
        parts = [losses.sum(), (margins > 0).sum(), margins.sum(), torch.tensor(len(margins), device=margins.device)]
        self.sums += torch.stack([part.to(self.sums.dtype) for part in parts])

    def compute(self) -> dict[str, Tensor]:
        """Return the mean loss, the share of pairs in their order (accuracy), the mean margin, and their number."""
        loss, right, margin, count = self.sums
        return {"loss": loss / count, "accuracy": right / count, "margin": margin / count, "pairs": count}


def wide() -> torch.dtype:
    """Return the type of sums: float64, which Apple's GPUs do not have."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


SHOWN = {
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits per byte", 4),
    "accuracy": ("accuracy", 4),
    "margin": ("margin", 3),
    "exact_match": ("exact match", 4),
}
"""What is printed of an evaluation, in this order: a name, and the digits after the point."""


def shown(values: Mapping[str, float]) -> list[str]:
    """Return an evaluation's values, but for the loss, as they are printed."""
    return [f"{name} {values[key]:.{digits}f}" for key, (name, digits) in SHOWN.items() if key in values]
