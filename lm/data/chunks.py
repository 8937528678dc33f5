"""Chunks of block_size tokens: which ones a step sees depends only on the seed and on how many came before.

Shapes: B sequences in a micro-batch, T block_size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Batch = tuple[Tensor, ...]
"""tokens and targets, int64 (B, T); targets are the tokens shifted by one. Some data has more tensors."""


def draw(seed: int, first: int, count: int, below: int) -> np.ndarray:
    """Return the pseudo-random numbers of indices first … first + count - 1, see `draw_at`."""
    return draw_at(seed, np.arange(first, first + count), below)


def draw_at(seed: int, numbers: np.ndarray, below: int) -> np.ndarray:
    """Return the pseudo-random numbers of some indices, each in [0, below).

    Number i depends on (seed, i) alone, so that any process can compute any of them: SplitMix64 (Steele, Lea and Flood,
    "Fast Splittable Pseudorandom Number Generators", 2014) read as a counter-based generator.

    Returns:
        int64, of the shape of numbers.
    """
    with np.errstate(over="ignore"):
        key = mix(np.array([seed], dtype=np.int64).view(np.uint64))
        return (mix(key + numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) % np.uint64(below)).astype(
            np.int64
        )


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64-bit numbers scrambled: each bit depends on all."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


IGNORED = -100  # a target that is not predicted; torch's own ignore_index


class Stream(Dataset[Batch]):
    """Item k is one rank's micro-batch k of endless training, or a stack of whole batches.

    Example j of the global batch of step s is number s × batch_size + shift + j, whatever the number of ranks or
    micro-batches.

    Args:
        examples: Given (first, count), returns tokens and targets of training examples first … first + count - 1.
        micro_batch_size: Examples of a step in an item, B.
        steps: Above 1, an item stacks the whole batches of so many steps, K: (K, B, …).
        shift: Other than 0 where earlier steps had another batch size, see `TokenData.go_on`.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        examples: Callable[[int, int], Batch],
        *,
        micro_batch_size: int,
        steps: int = 1,
        shift: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples, self.micro_batch_size, self.steps, self.shift = examples, micro_batch_size, steps, shift
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, k: int) -> Batch:
        """Return item k, counted from the start of training."""
        size = self.micro_batch_size * self.steps
        batch = self.examples((k * self.world_size + self.rank) * size + self.shift, size)
        if self.steps > 1:  # (K B, …) -> (K, B, …)
            return tuple(one.unflatten(0, (self.steps, -1)) for one in batch)
        return batch


def random_rows(tokens: Tensor, targets: Tensor, seed: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens (N, T) and targets (N, …), drawn with replacement: example i is row `draw(seed, i)`."""
    chosen = torch.from_numpy(draw(seed, first, count, len(tokens)))  # (B,)
    return tokens[chosen], targets[chosen]


class From(Sampler[int]):
    """Counts up endlessly from a number that is read when iteration starts.

    Args:
        start: Returns the first number: on resume, the micro-batches already trained on.
    """

    def __init__(self, start: Callable[[], int]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        k = self.start()
        while True:
            yield k
            k += 1


class Sliced(Protocol):
    """Token ids that are read in slices: an array, or shards on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> np.ndarray:
        """Return ids start … stop - 1."""


def rows(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch's tokens and targets, a row a sequence: a pair of texts is two."""
    tokens, targets = (one.flatten(0, -2) if one.ndim > 2 else one for one in batch[:2])
    return tokens, targets
