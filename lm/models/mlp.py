"""MLP: the next token from a fixed number of tokens before it.

Bengio et al., "A Neural Probabilistic Language Model" (2003), with the BatchNorm of Karpathy's "makemore" part 3.

Shapes: B batch, T time (block_size), C channels (n_embd), V vocabulary.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from lm.bounds import checked
from lm.models.layers import BatchNorm, check_length, padded


class MLP(nn.Module):
    """Embeddings of the context side by side, then hidden layers of linear, BatchNorm and tanh, then a linear head.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Tokens of context, T.
        n_embd: Width of an embedding, C.
        n_hidden: Width of a hidden layer.
        n_layer: Number of hidden layers.
        batch_norm: Whether BatchNorm stands between a hidden layer's linear map and its tanh.
        bias: Whether the hidden layers' linear maps have biases, which BatchNorm makes superfluous.
        momentum: Weight of a batch in BatchNorm's running statistics.
        bessel: Whether BatchNorm divides by N - 1.
        head_scale: Factor on the head's initial weights; small, so that the untrained guess is nearly uniform.

    Raises:
        ValueError: A size is not positive.
    """

    @checked()
    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_embd: int = 10,
        n_hidden: int = 200,
        n_layer: int = 1,
        batch_norm: bool = True,
        bias: bool = False,
        momentum: float = 0.001,
        bessel: bool = False,
        head_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.wte = nn.Embedding(vocab_size, n_embd)
        widths = [block_size * n_embd] + [n_hidden] * n_layer
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out, bias=bias)
            nn.init.normal_(linear.weight, std=5 / 3 / fan_in**0.5)  # 5/3: tanh's gain
            norm = [BatchNorm(n_hidden, momentum=momentum, bessel=bessel)] if batch_norm else []
            layers += [linear, *norm, nn.Tanh()]
        self.hidden = nn.Sequential(*layers)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        with torch.no_grad():
            self.lm_head.weight *= head_scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token after a context.

        Args:
            tokens: int64 (B, T); fewer than block_size are padded in front with token 0.

        Returns:
            Logits (B, V).

        Raises:
            ValueError: T is larger than block_size.
        """
        check_length(tokens, self.block_size)
        x = self.wte(padded(tokens, self.block_size)).flatten(1)  # (B, T) -> (B, T, C) -> (B, T C)
        return self.lm_head(self.hidden(x))  # (B, T C) -> (B, n_hidden) -> (B, V)
