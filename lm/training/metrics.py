"""The loss of a split: a sum over tokens, divided by the tokens, over all batches and ranks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Sums of nats, tokens and bytes; divided only at the end, so that no batch or rank weighs more than its tokens."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Apple's GPUs have no float64
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("nats", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "TokenLoss":
        """Move to the module's device, but not to its dtype: under bf16-true, sums would have three digits."""
        super()._apply(lambda state: state.to(fn(state).device), *args, **kwargs)
        return self

    def update(self, nats: Tensor, tokens: Tensor | int, text_bytes: Tensor | int = 0) -> None:
        """Add a batch: its summed cross-entropy in nats, its number of targets, and the bytes that these stand for."""
        self.nats += nats
        self.tokens += tokens
        self.bytes += text_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return loss (nats per token), perplexity, bits_per_byte and tokens."""
        loss = self.nats / self.tokens
        bits = self.nats / math.log(2)
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits / self.bytes, "tokens": self.tokens}
