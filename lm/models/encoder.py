"""Encoder: a transformer that reads a whole text in both directions, and says its class.

Devlin et al., "BERT" (2018), without its pretraining; the blocks are those of `lm.models.Seq2Seq`'s encoder.

Shapes: B batch, T time, C channels (n_embd), V vocabulary.
"""

import torch
from torch import Tensor, nn

from lm.bounds import checked
from lm.models.dropout import Dropout
from lm.models.layers import check_heads, check_length, initialise
from lm.models.seq2seq import EncoderBlock


class Encoder(nn.Module):
    """An encoder with learned positions, pre-norm blocks, and a head over the mean of a text's tokens.

    A class is a token of the vocabulary, as `lm.data.ClassData` makes it, so a text has one prediction.

    Args:
        vocab_size: Number of different tokens, V, the classes among them.
        block_size: Longest text in tokens; also the number of positions.
        n_layer: Number of blocks.
        n_head: Attention heads per block; divides n_embd.
        n_embd: Width of the residual stream, C.
        dropout: Probability of dropping an element after the embeddings, in attention and on each residual branch.
        bias: Whether linear layers and LayerNorms have biases.
        pad_token: The token that fills a row after its text, which is not read; without it every token counts.

    Raises:
        ValueError: A size is not positive, n_head does not divide n_embd, dropout is outside [0, 1), or pad_token is
            outside the vocabulary.
    """

    @checked()
    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_layer: int = 2,
        n_head: int = 4,
        n_embd: int = 64,
        dropout: float = 0.0,
        bias: bool = True,
        pad_token: int | None = 0,
    ) -> None:
        super().__init__()
        check_heads(n_embd, n_head)
        if pad_token is not None and pad_token >= vocab_size:
            raise ValueError(f"pad_token is {pad_token}: it must be at least 0 and below vocab_size {vocab_size}")
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.pad_token = pad_token
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = Dropout(dropout)
        self.h = nn.ModuleList(
            EncoderBlock(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias) for _ in range(n_layer)
        )
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as GPT-2."""
        initialise(self, 0.02, {self.h: 2 * len(self.h)})

    def read(self, tokens: Tensor) -> Tensor:
        """Return which tokens are of the text, bool (B, T)."""
        return torch.ones_like(tokens, dtype=torch.bool) if self.pad_token is None else tokens != self.pad_token

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the text's class.

        Args:
            tokens: int64 (B, T), at most block_size.

        Returns:
            Logits (B, V).

        Raises:
            ValueError: The text is longer than block_size.
        """
        check_length(tokens, self.block_size)
        read = self.read(tokens)  # (B, T)
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device)))  # (B, T, C)
        for block in self.h:
            x = block(x, read[:, None, None, :])  # the mask is the same for all queries, (B, 1, 1, T)
        x = self.ln_f(x)  # (B, T, C)
        return self.lm_head((x * shares(read, x.dtype)).sum(1))  # (B, T, C) -> (B, C) -> (B, V)


def shares(read: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what each token has in the mean over those that are read (B, T, 1); of none, nothing has any."""
    counts = read.to(dtype)
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
