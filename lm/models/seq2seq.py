"""Seq2Seq: an encoder-decoder transformer that reads source and target from one stream.

Vaswani et al., "Attention Is All You Need" (2017); its blocks are pre-norm and its positions learned, as in GPT-2.
Source and target share the token embedding, and the output head is that embedding too (the paper's section 3.4).

Shapes: B batch, T time (the stream's), S keys, C channels (n_embd), H heads, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.bounds import checked
from lm.models.cache import Cache
from lm.models.dropout import Dropout
from lm.models.feed_forward import GELU, BlockMLP
from lm.models.layers import check_heads, check_length, initialise


class Attention(nn.Module):
    """Every position of x attends to the positions of memory that the mask allows; x itself may be the memory."""

    def __init__(self, *, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.c_q = nn.Linear(n_embd, n_embd, bias=bias)  # query of all heads
        self.c_kv = nn.Linear(n_embd, 2 * n_embd, bias=bias)  # key and value of all heads
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: Source of the queries, (B, T, C).
            memory: Source of the keys and values, (B, S, C); None where the cache has them all.
            mask: bool, broadcastable to (B, H, T, S); true where T may attend to S. A position that may attend to
                nothing gets zeros from its heads, never NaN.
            cache: Has the keys and values of earlier positions, and takes those of memory.
        """
        B, T, C = x.shape  # noqa: N806
        q = self.c_q(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, C/H)
        if memory is None:
            assert cache is not None
            k, v = cache.kept(self, mask.shape[-1])
        else:
            kv = self.c_kv(memory).unflatten(2, (2, self.n_head, -1))  # (B, S, C) -> (B, S, 2, H, C/H)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, S, C/H)
            if cache is not None:
                k, v = cache.extend(self, k, v)
        blind = ~mask.any(dim=-1, keepdim=True)  # (…, T, S) -> (…, T, 1)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, dropout_p=dropout_p)
        y = y.masked_fill(blind, 0.0)  # blind positions attended to everything, as a softmax over nothing is NaN
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, C/H) -> (B, T, C): heads side by side
        return self.resid_dropout(self.c_proj(y))


def make_mlp(*, n_embd: int, dropout: float, bias: bool) -> BlockMLP:
    """Return GPT-2's feed-forward network, four times as wide inside."""
    gelu = GELU(approximate="tanh")
    return BlockMLP(n_embd=n_embd, hidden_size=4 * n_embd, activation=gelu, dropout=dropout, bias=bias)


class EncoderBlock(nn.Module):
    """Self-attention over the whole source, then a feed-forward network."""

    def __init__(self, *, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = Attention(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = make_mlp(n_embd=n_embd, dropout=dropout, bias=bias)

    def forward(self, x: Tensor, source_mask: Tensor) -> Tensor:
        """Map the encoder's residual stream (B, T, C) to (B, T, C)."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, source_mask)
        return x + self.mlp(self.ln_2(x))


class DecoderBlock(nn.Module):
    """The target's causal self-attention, then attention to the encoded source, then a feed-forward network."""

    def __init__(self, *, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = Attention(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias)
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.cross_attn = Attention(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias)
        self.ln_3 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = make_mlp(n_embd=n_embd, dropout=dropout, bias=bias)

    def forward(
        self, x: Tensor, memory: Tensor | None, target_mask: Tensor, source_mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Map the decoder's residual stream (B, T, C) to (B, T, C).

        Args:
            x: The stream.
            memory: The encoder's output, (B, S, C); None where the cache has its keys and values.
            target_mask: Of the target's attention to itself, see `Attention`.
            source_mask: Of its attention to the source.
            cache: Has the keys and values of earlier positions, and takes these.
        """
        y = self.ln_1(x)
        x = x + self.attn(y, y, target_mask, cache)
        x = x + self.cross_attn(self.ln_2(x), memory, source_mask, cache)
        return x + self.mlp(self.ln_3(x))


class Seq2Seq(nn.Module):
    """An encoder-decoder transformer with learned positions and pre-norm blocks.

    What comes before a row's first start_token is its source, which the encoder reads in both directions. The start
    token and what follows is the decoder's input: it attends to its own past and the encoder's output. Both stacks
    run over the whole stream and masks keep them apart, so shapes do not depend on where the sources end. A row
    without start token is all source. Logits at source positions are finite and mean nothing.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest stream in tokens, source and target together; also the number of learned positions of
            each, the encoder's counted from the row's beginning and the decoder's from the start token.
        n_layer: Number of blocks in the encoder, and as many in the decoder.
        n_head: Attention heads per attention; divides n_embd.
        n_embd: Width of the residual streams, C.
        dropout: Probability of dropping an element after the embeddings, in attention and on each residual branch.
        bias: Whether linear layers and LayerNorms have biases.
        start_token: The token whose first occurrence in a row begins the decoder's input.
        pad_token: The token that attention ignores in a source; without it every source token counts.

    Raises:
        ValueError: A size is not positive, n_head does not divide n_embd, dropout is outside [0, 1), a special token
            is outside the vocabulary, or both are the same.
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
        start_token: int,
        pad_token: int | None = None,
    ) -> None:
        super().__init__()
        check_heads(n_embd, n_head)
        for name, token in {"start_token": start_token, "pad_token": pad_token}.items():
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(f"{name} is {token}: it must be at least 0 and below vocab_size {vocab_size}")
        if start_token == pad_token:
            raise ValueError(f"start_token and pad_token are both {start_token}: choose two different tokens")
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.start_token = start_token
        self.pad_token = pad_token
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe_encoder = nn.Embedding(block_size, n_embd)
        self.wpe_decoder = nn.Embedding(block_size, n_embd)
        self.drop = Dropout(dropout)
        self.encoder = nn.ModuleList(
            EncoderBlock(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias) for _ in range(n_layer)
        )
        self.ln_encoder = nn.LayerNorm(n_embd, bias=bias)
        self.decoder = nn.ModuleList(
            DecoderBlock(n_embd=n_embd, n_head=n_head, dropout=dropout, bias=bias) for _ in range(n_layer)
        )
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.reset_parameters()
        self.lm_head.weight = self.wte.weight

    def reset_parameters(self) -> None:
        """Initialise as GPT-2; a block has two residual branches in the encoder and three in the decoder."""
        initialise(self, 0.02, {self.encoder: 2 * len(self.encoder), self.decoder: 3 * len(self.decoder)})

    def masks(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's position in the target (B, T), and the attention masks.

        Returns:
            Positions, counted from the start token, 0 in the source; the mask of the source for all queries,
            (B, 1, 1, T); and the target's mask of itself, (B, 1, T, T).
        """
        T = tokens.shape[1]  # noqa: N806
        is_target = (tokens == self.start_token).cumsum(dim=1) > 0  # (B, T): from the first start token on
        is_source = ~is_target if self.pad_token is None else ~is_target & (tokens != self.pad_token)  # (B, T)
        source_mask = is_source[:, None, None, :]  # (B, T) -> (B, 1, 1, T): the same for all queries
        past = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()  # (T, T)
        target_mask = past & is_target[:, None, None, :]  # (T, T) & (B, 1, 1, T) -> (B, 1, T, T)
        at = (is_target.cumsum(dim=1) - 1).clamp(min=0)  # (B, T): the start token is at 0, like all sources
        return at, source_mask, target_mask

    def encode(self, embedded: Tensor, source_mask: Tensor) -> Tensor:
        """Return the encoder's output (B, T, C) for embedded tokens (B, T, C)."""
        positions = torch.arange(embedded.shape[1], device=embedded.device)  # (T,)
        memory = self.drop(embedded + self.wpe_encoder(positions))  # (B, T, C) + (T, C) -> (B, T, C)
        for block in self.encoder:
            memory = block(memory, source_mask)
        return self.ln_encoder(memory)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the token after each position of the target.

        Args:
            tokens: int64 (B, T), at most block_size with those before; source, start token and target in one row.
            cache: Has what is needed of the tokens before these, and takes these. The encoder reads a source in both
                directions, so all is computed anew where these have more of it.

        Returns:
            Logits (B, T, V).

        Raises:
            ValueError: The sequence is longer than block_size.
        """
        seen = tokens if cache is None else cache.read(tokens)  # (B, S), S = T without a cache
        check_length(seen, self.block_size)
        T, S = tokens.shape[1], seen.shape[1]  # noqa: N806
        at, source_mask, target_mask = self.masks(seen)
        if cache is not None and source_mask[..., -T:].any():
            cache.clear()
        R = S if cache is None or cache.empty else T  # noqa: N806 - positions that are computed now, the last of all
        embedded = self.wte(seen[:, -R:])  # (B, R) -> (B, R, C)
        memory = self.encode(embedded, source_mask) if R == S else None  # (B, S, C)
        x = self.drop(embedded + self.wpe_decoder(at[:, -R:]))  # (B, R, C)
        for block in self.decoder:
            x = block(x, memory, target_mask[:, :, -R:], source_mask, cache)
        return self.lm_head(self.ln_f(x[:, -T:]))  # (B, T, C) -> (B, T, V)
