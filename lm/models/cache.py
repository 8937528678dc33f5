"""What a network keeps of the tokens it has read, so that its next call reads the new ones alone.

Shapes: B batch, T new tokens, S all tokens so far, D channels of a head, … a layer's own leading dimensions.
"""

import torch
from torch import Tensor, nn


class Cache:
    """Keys and values of one network's layers, for the tokens read so far.

    The same cache goes to each call of the network's forward; each call reads the tokens that follow those of the call
    before, and gives the logits that one call for all of them would.

    Args:
        capacity: Most tokens, at most the network's block_size; memory for them is taken at the first call.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: Tensor | None = None
        """int64 (B, S), all tokens so far."""
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}

    def read(self, tokens: Tensor) -> Tensor:
        """Take the next tokens (B, T); return all so far (B, S).

        Raises:
            ValueError: They are more than the capacity.
        """
        seen = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)  # (B, S), (B, T) -> (B, S+T)
        if seen.shape[1] > self.capacity:
            raise ValueError(f"{seen.shape[1]} tokens are more than the cache's {self.capacity}")
        self.tokens = seen
        return seen

    def extend(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what a layer has made of the tokens read last; return what it has of all so far.

        Args:
            layer: Whose.
            new: Each (…, T, D).

        Returns:
            Each (…, S, D).
        """
        assert self.tokens is not None
        S = self.tokens.shape[1]  # noqa: N806
        if layer not in self._kept:
            self._kept[layer] = tuple(one.new_empty(*one.shape[:-2], self.capacity, one.shape[-1]) for one in new)
        kept = self._kept[layer]
        for store, one in zip(kept, new, strict=True):
            store[..., S - one.shape[-2] : S, :] = one
        return tuple(store[..., :S, :] for store in kept)
