"""Which chunk of a corpus is training example number i: a pure function of (seed, i), whatever the corpus' size.

Shapes: B sequences, T block_size.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from lm.corpus import shards
from lm.data.chunks import IGNORED, Batch, Sliced, draw_at, mix
from lm.errors import UserError

Order = Literal["random", "permutation"]
GROUP = 1024  # documents whose chunks are counted together
ROUND = 1000  # examples in which every corpus of a mixture has exactly its share


def permuted(seed: int, numbers: np.ndarray, below: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch of each number, and its place in that epoch's permutation of 0 … below - 1.

    Any place is computed without the others, so a permutation of any size costs no memory: a Feistel network of four
    rounds over the next power of four, repeated until the result is in range (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).

    Returns:
        Both int64, of the shape of numbers.
    """
    epochs, places = np.divmod(numbers.astype(np.int64), below)
    half = np.uint64(max(1, ((below - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        keys = mix(mix(np.array([seed], np.int64).view(np.uint64)) + epochs.astype(np.uint64))
        found = places.astype(np.uint64)
        walking = np.arange(len(found))
        while len(walking):
            left, right = found[walking] >> half, found[walking] & mask
            for turn in range(4):
                left, right = right, left ^ (mix(right ^ (keys[walking] + np.uint64(turn))) & mask)
            found[walking] = left << half | right
            walking = walking[found[walking] >= below]
    return epochs, found.astype(np.int64)


class Running:
    """Chunks of one continuous text, regardless of its documents.

    Args:
        tokens: The split (N,).
        block_size: Tokens in a sequence, T.
        order: random draws any offset; permutation gives each of the (N - 1) // T chunks once per epoch.
        seed: Determines the order.
    """

    def __init__(self, tokens: Sliced, block_size: int, order: Order, seed: int) -> None:
        self.tokens, self.block_size, self.order, self.seed = tokens, block_size, order, seed

    def __call__(self, numbers: np.ndarray) -> Batch:
        """Return the examples of those numbers, (B, T)."""
        size, T = len(self.tokens), self.block_size  # noqa: N806
        if self.order == "random":
            offsets = draw_at(self.seed, numbers, size - T)
        else:
            chunks, rest = divmod(size - 1, T)
            epochs, places = permuted(self.seed, numbers, chunks)
            # each epoch shifts its chunks at random, so that the tokens left over are not always the same
            offsets = places * T + draw_at(self.seed, epochs, rest + 1)
        rows = np.empty((len(numbers), T + 1), dtype=np.int64)  # (B, T + 1)
        for row, offset in zip(rows, offsets.tolist(), strict=True):
            row[:] = self.tokens[offset : offset + T + 1]
        chunk = torch.from_numpy(rows)
        return chunk[:, :-1], chunk[:, 1:]  # (B, T), (B, T)


class Documents:
    """Chunks that each lie within one document; the padding after a short one is ignored as a target.

    Args:
        tokens: The split.
        held: The same, read into memory where it is small.
        block_size: Tokens in a sequence, T.
        order: random draws chunks with replacement; permutation gives each once per epoch.
        seed: Determines the order.
    """

    def __init__(self, tokens: shards.Tokens, held: Sliced, block_size: int, order: Order, seed: int) -> None:
        self.tokens, self.held, self.block_size, self.order, self.seed = tokens, held, block_size, order, seed
        self.group = GROUP
        counts = [self._chunks(group)[1].sum() for group in range(-(-tokens.documents // GROUP))]
        self.ends = np.cumsum(counts, dtype=np.int64)  # chunks up to the end of each group

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _chunks(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where a group's documents start and the last one ends, and how many chunks each has."""
        last = min((group + 1) * self.group, self.tokens.documents)
        starts = self.tokens.starts(group * self.group, last + 1)
        return starts, -(-(np.diff(starts) - 1) // self.block_size)

    def __call__(self, numbers: np.ndarray) -> Batch:
        """Return the examples of those numbers, (B, T)."""
        if self.order == "random":
            return self.at(draw_at(self.seed, numbers, len(self)))
        return self.at(permuted(self.seed, numbers, len(self))[1])

    def at(self, places: np.ndarray) -> Batch:
        """Return the chunks at places in the order of the text, (B, T)."""
        T = self.block_size  # noqa: N806
        tokens = np.zeros((len(places), T), dtype=np.int64)
        targets = np.full((len(places), T), IGNORED, dtype=np.int64)
        for i, place in enumerate(places.tolist()):
            group = int(np.searchsorted(self.ends, place, side="right"))
            starts, counts = self._cached(group)
            ends = np.cumsum(counts)
            within = place - (int(self.ends[group - 1]) if group else 0)
            document = int(np.searchsorted(ends, within, side="right"))
            start = int(starts[document]) + (within - int(ends[document] - counts[document])) * T
            ids = self.held[start : min(start + T + 1, int(starts[document + 1]))]
            tokens[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def between(self, start: int, stop: int) -> Batch:
        """Return the chunks start … stop - 1 in the order of the text, (B, T)."""
        return self.at(np.arange(start, stop))

    def _cached(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        if "_groups" not in self.__dict__:
            self._groups = lru_cache(256)(self._chunks)
        return self._groups(group)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_groups"}


Examples = Callable[[np.ndarray], Batch]


class Mixture:
    """Examples of several corpora, each with its share of every thousand.

    Args:
        parts: The examples of each corpus, by number.
        weights: Their shares, of any sum.
        seed: Determines which corpus comes when.
    """

    def __init__(self, parts: list[Examples], weights: list[float], seed: int) -> None:
        self.parts, self.seed = parts, seed
        exact = np.array(weights) / sum(weights) * ROUND
        self.quotas = np.floor(exact).astype(np.int64)
        largest = np.argsort(self.quotas - exact, kind="stable")[: ROUND - self.quotas.sum()]  # the largest remainders
        self.quotas[largest] += 1
        if self.quotas.min() < 1:
            raise UserError(f"data.corpus: its weights are {weights}: each must be at least a thousandth of their sum")

    def assign(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each of a turn's thousand examples, its corpus and its number among that corpus' examples."""
        order = np.argsort(draw_at(self.seed, np.arange(turn * ROUND, (turn + 1) * ROUND), 1 << 62), kind="stable")
        which, number = np.empty(ROUND, np.int64), np.empty(ROUND, np.int64)
        which[order] = np.repeat(np.arange(len(self.quotas)), self.quotas)
        for k, quota in enumerate(self.quotas):
            number[which == k] = turn * quota + np.arange(quota)
        return which, number

    def __call__(self, numbers: np.ndarray) -> Batch:
        """Return the examples of those numbers, (B, T)."""
        turns, places = np.divmod(numbers, ROUND)
        assigned = {turn: self.assign(turn) for turn in np.unique(turns).tolist()}
        which = np.array([assigned[turn][0][place] for turn, place in zip(turns.tolist(), places, strict=True)])
        number = np.array([assigned[turn][1][place] for turn, place in zip(turns.tolist(), places, strict=True)])
        batches = {k: self.parts[k](number[which == k]) for k in np.unique(which).tolist()}
        tokens, targets = (
            torch.empty((len(numbers), *next(iter(batches.values()))[0].shape[1:]), dtype=torch.int64) for _ in range(2)
        )
        for k, batch in batches.items():
            tokens[which == k], targets[which == k] = batch
        return tokens, targets


def numbered(examples: Examples, first: int, count: int) -> Batch:
    """Return examples number first … first + count - 1."""
    return examples(np.arange(first, first + count))
