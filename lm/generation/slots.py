"""A cache of many texts at once, each at a place of its own in its text.

Shapes: N slots, B rows read now, T new tokens of each, S keys looked at, C channels (n_embd), D channels of a head.
"""

import torch
from torch import Tensor, nn

from lm.models.cache import Cache

ALIGNED = 64
"""Keys looked at are a multiple of this. Those beyond a text's end are masked, and add zeros at the end of each sum:
how many there are changes no bit, as long as all are full vectors of the processor."""


def _aligned(length: int) -> int:
    return -(-length // ALIGNED) * ALIGNED


class Slots(Cache):
    """What a network needs of N texts; each call of its forward reads rows of the first texts, or of one.

    Memory for all of them is taken when a layer is first called, and never more.

    Args:
        number: How many texts, N.
        capacity: Most tokens of each.
        device: Where they are.
    """

    def __init__(self, number: int, capacity: int, device: torch.device | str = "cpu") -> None:
        super().__init__(capacity, last=1)
        self.number, self._room = number, _aligned(capacity)
        self.lengths = torch.zeros(number, dtype=torch.int64, device=device)
        """Tokens of each text that were read, (N,); set by the engine."""
        self.texts = torch.zeros(number, self._room, dtype=torch.int64, device=device)
        self._slots = torch.arange(number, device=device)[:, None]  # (N, 1)
        self.select(slice(0, number))
        self._positions, self._keys = self.texts, self._room

    def select(self, rows: slice, used: list[int] | None = None) -> None:
        """Say of which slots the next tokens are, and which of these rows mean something; all by default."""
        self._rows, self._used = rows, used

    def place(self, tokens: Tensor, document_end: int | None = None) -> tuple[Tensor, Tensor]:
        """Take the next tokens (B, T) of the selected slots; see `Cache`, but positions are (B, T) and there is a mask.

        Rows at their end read their last position again: what comes out for them means nothing.
        """
        T, texts = tokens.shape[1], self.texts[self._rows]  # noqa: N806
        positions = self.lengths[self._rows, None] + torch.arange(T, device=tokens.device)  # (B, 1) + (T,) -> (B, T)
        positions.clamp_(max=self.capacity - 1)
        texts.scatter_(1, positions, tokens)
        longest = positions if self._used is None else self.lengths[self._used]
        self._positions, self._keys = positions, _aligned(int(longest.max()) + 1)
        allowed = (
            torch.arange(self._keys, device=tokens.device) <= positions[:, :, None]
        )  # (S,), (B, T, 1) -> (B, T, S)
        if document_end is not None:
            ends = texts[:, : self._keys] == document_end  # (B, S)
            document = ends.cumsum(1) - ends.long()  # how many documents ended before
            here = document.gather(1, positions.clamp(max=self._keys - 1))  # (B, T)
            allowed &= document[:, None, :] == here[:, :, None]  # (B, 1, S), (B, T, 1)
            self._begins = (texts.gather(1, (positions - 1).clamp(min=0)) == document_end)[..., None]  # (B, T, 1)
        return positions, allowed[:, None]

    def extend(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what a layer has made of the tokens read last, (B, …, T, D); return the rows' so far, (B, …, S, D)."""
        if layer not in self._kept:
            self._kept[layer] = tuple(
                one.new_zeros(self.number, *one.shape[1:-2], self._room, one.shape[-1]) for one in new
            )
        rows = self._slots[self._rows]  # (B, 1)
        for store, one in zip(self._kept[layer], new, strict=True):
            store.movedim(-2, 1)[rows, self._positions] = one.movedim(-2, 1)  # (N, S, …, D), (B, T, …, D)
        return tuple(store[self._rows, ..., : self._keys, :] for store in self._kept[layer])

    def earlier(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Keep what a layer reads now, (B, T, C); return what it read at the position before each; see `Cache`."""
        (read,) = self.extend(layer, x)  # (B, S, C)
        before = (self._positions - 1)[:, :, None]  # (B, T, 1)
        near = before.clamp(0, self._keys - 1)  # rows that mean nothing may be further on
        begins = before < 0 if self._begins is None else (before < 0) | self._begins
        return read.gather(1, near.expand_as(x)).masked_fill(begins, 0.0)

    @property
    def bytes(self) -> int:
        """Memory of all slots, once each layer was called."""
        return self.texts.nbytes + sum(store.nbytes for stores in self._kept.values() for store in stores)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first `length` tokens of another."""
        self.texts[target, :length] = self.texts[source, :length]
        self.lengths[target] = length
        for stores in self._kept.values():
            for store in stores:
                store[target, ..., :length, :] = store[source, ..., :length, :]
