"""Evaluation sets: each example of a split once, divided so that all ranks have equally many batches.

Ranks reduce their sums together, and a sharded network runs each forward pass on all ranks together: a rank with one
batch more than another would wait forever.

Shapes: B examples in a batch, T block_size.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lm.data.chunks import IGNORED, Batch, Sliced


class EvaluationSet(Dataset[Batch]):
    """The batches of one rank; batches go to the ranks in turn.

    A rank that has one batch fewer than others gets the very first batch again, with all targets ignored.

    Args:
        read: Given (start, stop), returns examples start … stop - 1 of the split.
        count: How many examples it has.
        batch_size: Most examples in a batch, B.
        short_last: Whether the last example is shorter than the others, and so a batch of its own.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        read: Callable[[int, int], Batch],
        count: int,
        *,
        batch_size: int,
        short_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.read = read
        equal = count - short_last
        size = max(1, min(batch_size, equal // world_size))  # rounded down: every rank gets a batch if possible
        spans = [(start, min(start + size, equal)) for start in range(0, equal, size)]
        if short_last:
            spans.append((equal, count))
        self.spans = spans[rank::world_size]
        self.padded = len(self.spans) < -(-len(spans) // world_size)
        if self.padded:
            self.spans.append(spans[0])

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, k: int) -> Batch:
        """Return this rank's batch k; raises IndexError past the last."""
        tokens, targets, *more = self.read(*self.spans[k])
        if self.padded and k == len(self) - 1:
            targets = torch.full_like(targets, IGNORED)
        return tokens, targets, *more


def of_rows(tokens: Tensor, targets: Tensor, *, batch_size: int, rank: int = 0, world_size: int = 1) -> EvaluationSet:
    """Return the evaluation set of examples that are in memory, tokens (N, T) and targets (N,) or (N, T)."""
    read = partial(_rows, tokens, targets)
    return EvaluationSet(read, len(tokens), batch_size=batch_size, rank=rank, world_size=world_size)


def _rows(tokens: Tensor, targets: Tensor, start: int, stop: int) -> Batch:
    return tokens[start:stop], targets[start:stop]


def of_chunks(ids: Sliced, *, block_size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> EvaluationSet:
    """Return the evaluation set of a continuous text: every token but the first is a target once.

    Args:
        ids: Token ids of the split (N,).
        block_size: Tokens in a sequence, T; the last sequence may be shorter.
        batch_size: Most sequences in a batch, B.
        rank: This process.
        world_size: Number of processes.
    """
    count, rest = divmod(max(0, len(ids) - 1), block_size)
    read, short = partial(_chunks, ids, block_size), rest > 0
    places = {"rank": rank, "world_size": world_size}
    return EvaluationSet(read, count + short, batch_size=batch_size, short_last=short, **places)


def _chunks(ids: Sliced, block_size: int, start: int, stop: int) -> Batch:
    chunk = torch.from_numpy(ids[start * block_size : stop * block_size + 1].astype(np.int64))
    T = min(block_size, len(chunk) - 1)  # noqa: N806
    return chunk[:-1].view(-1, T), chunk[1:].view(-1, T)  # (B, T), (B, T)
