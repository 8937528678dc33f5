"""BagOfWords: the next token from the average of all so far, the simplest way to use a past of any length.

As in Karpathy's "makemore". Shapes: B batch, T time, C channels (n_embd), H hidden channels, V vocabulary.
"""

import torch
from torch import Tensor, nn

from lm.bounds import checked
from lm.models.cache import Cache
from lm.models.layers import check_length, initialise


class CausalAverage(nn.Module):
    """Each position's average of itself and all before it: attention whose weights are all alike."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); the cache has the sum of what was before, and takes the sum after x."""
        before = () if cache is None else cache.state(self)
        sums = x.cumsum(1) + before[0] if before else x.cumsum(1)  # (B, T, C) + (B, 1, C)
        if cache is not None:
            cache.keep_state(self, (sums[:, -1:],))
        stop = x.shape[1] if cache is None else cache.length
        return sums / counts(x, stop)

    def extra_repr(self) -> str:
        """Say what it does."""
        return "(x_0 + … + x_t) / (t + 1)"


def counts(x: Tensor, stop: int) -> Tensor:
    """Return how many positions each of x's (B, T, C) averages, (T, 1): its last one is stop - 1."""
    return torch.arange(stop - x.shape[1] + 1, stop + 1, device=x.device, dtype=x.dtype).unsqueeze(1)


class BagOfWords(nn.Module):
    """Token and position embeddings, plus their average so far, plus a hidden layer; then a linear head.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest sequence.
        n_embd: Width of an embedding, C.
        n_hidden: Width of the hidden layer.

    Raises:
        ValueError: A size is not positive.
    """

    @checked()
    def __init__(self, vocab_size: int, block_size: int, *, n_embd: int = 64, n_hidden: int = 64) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.average = CausalAverage()
        self.mlp = nn.Sequential(nn.Linear(n_embd, n_hidden), nn.Tanh(), nn.Linear(n_hidden, n_embd))
        self.lm_head = nn.Linear(n_embd, vocab_size)
        initialise(self, 0.02, {})

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each position of tokens (B, T).

        Args:
            tokens: int64 (B, T), at most block_size with those before.
            cache: Has the sum of the embeddings before, and takes that after these.

        Raises:
            ValueError: They are more than block_size.
        """
        seen = tokens if cache is None else cache.read(tokens)
        check_length(seen, self.block_size)
        T = tokens.shape[1]  # noqa: N806
        x = self.wte(tokens) + self.wpe.weight[seen.shape[1] - T : seen.shape[1]]  # (B, T, C) + (T, C)
        x = x + (self.average(x) if cache is None else self.average(x, cache))
        x = x + self.mlp(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)
