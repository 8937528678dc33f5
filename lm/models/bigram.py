"""The bigram table: the next token's logits depend on the current token alone.

The first rung of the road (Karpathy, "makemore" part 1). Shapes: B batch, T time, V vocabulary.
"""

from torch import Tensor, nn

from lm.bounds import checked


class Bigram(nn.Module):
    """A table of logits, one row per token.

    It starts at zero, so the untrained loss is ln V exactly and the first step already updates every row that it saw.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest sequence; the table itself only ever uses one token.
    """

    @checked()
    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token after each of tokens (B, T)."""
        return self.table(tokens)  # (B, T) -> (B, T, V)
