"""GPT: a decoder-only transformer, from one attention head to GPT-2 XL.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); Vaswani et al., "Attention Is All You
Need" (2017). Parameter names are GPT-2's (wte, wpe, h, ln_1, attn.c_attn, …).

Shapes: B batch, T time, C channels (n_embd), H heads, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and at what came before it; all heads come from one projection."""

    def __init__(self, *, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)  # query, key and value of all heads
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape  # noqa: N806
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, C) -> (B, T, 3, H, C/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, C/H) -> (B, T, C): heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """The position-wise feed-forward network, four times as wide inside."""

    def __init__(self, *, n_embd: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Communication, then computation; each adds to the residual stream and reads it through a LayerNorm."""

    def __init__(self, *, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = CausalSelfAttention(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = MLP(n_embd=n_embd, dropout=dropout, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT with learned positions and pre-norm blocks.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest context in tokens; also the number of learned positions.
        n_layer: Number of blocks.
        n_head: Attention heads per block; divides n_embd.
        n_embd: Width of the residual stream, C.
        dropout: Probability of dropping an element after the embedding, in attention and on each residual branch.
        bias: Whether linear layers and LayerNorms have biases (GPT-2: yes).
        tie_weights: Whether the output head is the token embedding (GPT-2: yes).

    Raises:
        ValueError: A size is not positive, n_head does not divide n_embd, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        bias: bool = True,
        tie_weights: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        for name, size in {"vocab_size": vocab_size, "block_size": block_size, **sizes}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: it must be at least 1")
        if n_embd % n_head:
            raise ValueError(f"n_head {n_head} does not divide n_embd {n_embd}: choose n_embd as a multiple of n_head")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: it must be at least 0 and below 1")
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.reset_parameters()
        if tie_weights:
            self.lm_head.weight = self.wte.weight

    def reset_parameters(self) -> None:
        """Initialise as GPT-2: N(0, 0.02), biases zero, residual projections scaled by 1/sqrt(2 n_layer).

        Each of the 2 n_layer residual branches adds its variance to the stream; the scale keeps their sum at one
        branch's.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.h)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token after each position.

        Args:
            tokens: int64 (B, T), T at most block_size.

        Returns:
            Logits (B, T, V).

        Raises:
            ValueError: The sequence is longer than block_size.
        """
        T = tokens.shape[1]  # noqa: N806
        if self.block_size < T:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.block_size}")
        positions = torch.arange(T, device=tokens.device)  # (T,)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C) + (T, C) -> (B, T, C)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # (B, T, C) -> (B, T, V)
