"""What a network keeps of the tokens it has read, so that its next call reads the new ones alone.

Shapes: B batch, T new tokens, S all tokens so far, C channels (n_embd), D channels of a head, … a layer's own leading
dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models.masks import same_document


class Cache:
    """What the layers of one network need of the tokens read so far, such as attention's keys and values.

    The same cache goes to each call of the network's forward; each call reads the tokens that follow those of the call
    before, and gives the logits that one call for all of them would.

    Args:
        capacity: Most tokens, at most the network's block_size; memory for them is taken at the first call.
        last: Of how many of the last tokens of a call logits are needed at least; None for all.
    """

    def __init__(self, capacity: int, last: int | None = None) -> None:
        self.capacity, self.last = capacity, last
        self.tokens: Tensor | None = None
        """int64 (B, S), all tokens so far."""
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}
        self._begins: Tensor | None = None
        """Whether a document begins at each of the tokens read last, bool (B, T, 1); None where there is but one."""

    @property
    def length(self) -> int:
        """Tokens read so far, S."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    @property
    def empty(self) -> bool:
        """Whether no layer has kept anything."""
        return not self._kept

    def cut(self, length: int) -> None:
        """Forget all tokens but the first `length`; for layers that keep what `extend` takes alone."""
        self.tokens = None if not length or self.tokens is None else self.tokens[:, :length]

    def repeat(self, count: int) -> None:
        """Go on with `count` texts, which all begin as the single one that was read."""
        assert self.tokens is not None
        self.tokens = self.tokens.repeat(count, 1)  # (1, S) -> (B, S)
        self._kept = {
            layer: tuple(one.repeat(count, *[1] * (one.ndim - 1)) for one in kept) for layer, kept in self._kept.items()
        }

    def clear(self) -> None:
        """Forget what layers have kept, but not the tokens."""
        self._kept.clear()

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

    def place(self, tokens: Tensor, document_end: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Take the next tokens (B, T); return where they are, and what they may attend to.

        Args:
            tokens: int64 (B, T).
            document_end: The token after which attention starts anew; None for none.

        Returns:
            Their positions, int64 (T,); and the attention mask, bool (B, 1, T, S), or None where it is causal.
        """
        seen, T = self.read(tokens), tokens.shape[1]  # noqa: N806
        positions = torch.arange(seen.shape[1] - T, seen.shape[1], device=tokens.device)  # (T,)
        if document_end is None:
            return positions, None
        before = F.pad(seen, (1, -1))[:, -T:]  # (B, S) -> (B, T)
        self._begins = (before == document_end)[..., None]
        return positions, same_document(seen, document_end, last=T)

    def extend(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what a layer has made of the tokens read last; return what it has of all so far.

        Args:
            layer: Whose.
            new: Each (…, T, D).

        Returns:
            Each (…, S, D).
        """
        S = self.length  # noqa: N806
        if layer not in self._kept:
            self._kept[layer] = tuple(one.new_zeros(*one.shape[:-2], self.capacity, one.shape[-1]) for one in new)
        kept = self._kept[layer]
        for store, one in zip(kept, new, strict=True):
            store.narrow(-2, S - one.shape[-2], one.shape[-2]).copy_(one)
        return tuple(store.narrow(-2, 0, S) for store in kept)

    def earlier(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Keep what a layer reads now, (B, T, C); return for each position what it read at the one before.

        Where a document begins there are zeros. All positions are kept, so that a cache can be cut, and be one of many
        texts.
        """
        (read,) = self.extend(layer, x)  # (B, S, C)
        before = read[:, -x.shape[1] - 1 : -1]  # (B, T, C), or (B, T - 1, C) at a text's beginning
        before = F.pad(before, (0, 0, x.shape[1] - before.shape[1], 0))  # -> (B, T, C)
        return before if self._begins is None else before.masked_fill(self._begins, 0.0)

    def kept(self, layer: nn.Module, length: int) -> tuple[Tensor, ...]:
        """Return what `extend` has kept of a layer's first positions, zeros where nothing, each (…, length, D)."""
        return tuple(store[..., :length, :] for store in self._kept[layer])

    def state(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """Return the state that a layer kept after its last call; empty before its first one."""
        return self._kept.get(layer, ())

    def keep_state(self, layer: nn.Module, state: tuple[Tensor, ...]) -> None:
        """Keep a layer's state for its next call."""
        self._kept[layer] = state

    def follow(self, layer: nn.Module, x: Tensor, size: int, before: Tensor | None = None) -> Tensor:
        """Return the last `size` positions that a layer has read, and x; keep the last ones for its next call.

        Args:
            layer: Whose.
            x: What it reads now, (…, T).
            size: How many.
            before: What stands before x in the layer's first call, (…, any); by default as many zeros.

        Returns:
            (…, size + T).
        """
        if layer not in self._kept:
            self._kept[layer] = (x.new_zeros(*x.shape[:-1], size) if before is None else before,)
        both = torch.cat([*self._kept[layer], x], dim=-1)  # (…, size), (…, T) -> (…, size + T)
        self._kept[layer] = (both[..., both.shape[-1] - size :],)
        return both
