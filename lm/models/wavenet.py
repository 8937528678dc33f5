"""WaveNet-like networks: the context is fused step by step, neighbours first.

van den Oord et al., "WaveNet" (2016); Karpathy, "makemore" part 5.

Shapes: B batch, T time, C channels, V vocabulary, n tokens fused at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.bounds import checked
from lm.models.cache import Cache
from lm.models.dropout import Dropout
from lm.models.layers import BatchNorm, FlattenConsecutive, check_length, padded


class WaveNet(nn.Module):
    """Hierarchical fusion: each layer concatenates n neighbours and maps them by linear, BatchNorm and tanh.

    After d layers one position is left that has seen n^d tokens. The same weights are also a stack of dilated causal
    convolutions: `dense=True` computes the logits of every position of a longer sequence in one pass, sharing what
    overlapping contexts have in common.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest sequence; with dense=False the context itself, n^d.
        n_embd: Width of an embedding.
        n_hidden: Width of the layers.
        fuse: n.
        depth: d; by default such that n^d is block_size. Required with dense=True, where the context is n^d.
        dense: Whether the logits of all positions are computed, by dilated convolutions.
        norm_over_time: Whether BatchNorm's statistics are over batch and time, or for each position of a layer alone.
        momentum: Weight of a batch in BatchNorm's running statistics.
        bessel: Whether BatchNorm divides by N - 1.
        head_scale: Factor on the head's initial weights.

    Raises:
        ValueError: block_size is not a power of n, or settings do not go together.
    """

    @checked()
    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_embd: int = 24,
        n_hidden: int = 128,
        fuse: int = 2,
        depth: int | None = None,
        dense: bool = False,
        norm_over_time: bool = True,
        momentum: float = 0.1,
        bessel: bool = False,
        head_scale: float = 0.1,
    ) -> None:
        super().__init__()
        depth = _depth(block_size, fuse) if depth is None else depth
        if not dense and fuse**depth != block_size:
            raise ValueError(f"depth {depth} fuses {fuse**depth} tokens, block_size is {block_size}: make them equal")
        if dense and not norm_over_time:
            raise ValueError("norm_over_time false keeps statistics for a fixed position: it does not go with dense")
        self.vocab_size, self.block_size, self.dense = vocab_size, block_size, dense
        self.context = fuse**depth
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.h = nn.ModuleList()
        for level in range(1, depth + 1):
            left = self.context // fuse**level
            positions = None if norm_over_time or left == 1 else left
            norm = BatchNorm(n_hidden, n_positions=positions, momentum=momentum, bessel=bessel)
            linear = nn.Linear(fuse * (n_embd if level == 1 else n_hidden), n_hidden, bias=False)
            self.h.append(nn.Sequential(FlattenConsecutive(fuse), linear, norm, nn.Tanh()))
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        with torch.no_grad():
            self.lm_head.weight *= head_scale

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits of the token after a context, or with dense of the token after each position.

        Args:
            tokens: int64 (B, T), padded in front with token 0 where a context is incomplete.
            cache: Has what is needed of the tokens before these, and takes these: the last states of each level with
                dense, else the tokens alone.

        Returns:
            Logits (B, V), or with dense (B, T, V).

        Raises:
            ValueError: T is larger than block_size.
        """
        seen = tokens if cache is None else cache.read(tokens)
        check_length(seen, self.block_size)
        if self.dense:
            return self.convolve(tokens, cache)
        x = self.wte(padded(seen, self.context))  # (B, T, C)
        for block in self.h:
            x = block(x)  # (B, T, C) -> (B, T/n, C), at last (B, C)
        return self.lm_head(x)  # (B, V)

    def convolve(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits (B, T, V) after each position of tokens (B, T), of any T; see `forward` for the cache.

        A linear map of n neighbours' channels is a convolution with a kernel of n. Fusing at level i joins spans of n^i
        tokens, so the kernel's taps are n^i apart.
        """
        first = cache is None or cache.empty
        x = F.pad(tokens, (self.context - 1, 0)) if first else tokens  # (B, T) -> (B, T + context - 1)
        x = self.wte(x).mT  # -> (B, C, T + context - 1)
        block: Any
        for level, block in enumerate(self.h):
            flatten, linear, norm, tanh = block
            n = flatten.n
            if cache is not None:  # the first tokens are padded already
                x = cache.follow(block, x, (n - 1) * n**level, before=x[..., :0])
            kernel = linear.weight.unflatten(1, (n, -1)).mT  # (C', n C) -> (C', n, C) -> (C', C, n)
            x = F.conv1d(x, kernel, dilation=n**level)  # T shrinks by (n - 1) n^level
            x = tanh(norm(x.mT)).mT  # BatchNorm has its channels last
        return self.lm_head(x.mT)  # (B, C, T) -> (B, T, C) -> (B, T, V)


def _depth(block_size: int, fuse: int) -> int:
    """Return d with fuse^d = block_size."""
    if fuse < 2:
        raise ValueError(f"fuse is {fuse}: it must be at least 2")
    depth = 1
    while fuse**depth < block_size:
        depth += 1
    if fuse**depth != block_size:
        raise ValueError(f"block_size {block_size} is not a power of fuse {fuse}: use {fuse**depth}")
    return depth


class GatedBlock(nn.Module):
    """The paper's residual block: tanh of one dilated convolution times sigmoid of another.

    Args:
        n_channels: Width of the residual and of the skip connection, C.
        dilation: Distance of the two taps.
        dropout: Probability of dropping a gated unit.
    """

    def __init__(self, n_channels: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Conv1d(n_channels, 2 * n_channels, 2, dilation=dilation)  # filter and gate
        self.drop = Dropout(dropout)
        self.proj = nn.Conv1d(n_channels, 2 * n_channels, 1)  # residual and skip

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Map the stream (B, C, T) to itself plus the block's residual, and to its skip, both (B, C, T)."""
        d = self.dilation
        past = F.pad(x, (d, 0)) if cache is None else cache.follow(self, x, d)  # (B, C, T) -> (B, C, T + d)
        filtered, gate = self.conv(past).chunk(2, dim=1)  # each (B, C, T)
        residual, skip = self.proj(self.drop(filtered.tanh() * gate.sigmoid())).chunk(2, dim=1)
        return x + residual, skip


class GatedWaveNet(nn.Module):
    """The paper's network: gated blocks of growing dilation, whose skip connections add up to the output.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest sequence.
        n_embd: Width of the stream, C.
        n_layer: Blocks in a stack; block i has dilation 2^i.
        n_stack: How often the stack is repeated.
        dropout: Probability of dropping a gated unit.

    Raises:
        ValueError: A size is not positive, or dropout is outside [0, 1).
    """

    @checked()
    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_embd: int = 48,
        n_layer: int = 4,
        n_stack: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.wte = nn.Embedding(vocab_size, n_embd)
        dilations = [2**i for i in range(n_layer)] * n_stack
        self.h = nn.ModuleList(GatedBlock(n_embd, dilation=dilation, dropout=dropout) for dilation in dilations)
        self.mix = nn.Linear(n_embd, n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each position of tokens (B, T).

        Args:
            tokens: int64 (B, T), at most block_size with those before.
            cache: Has the last states of each block, and takes those after these tokens.

        Raises:
            ValueError: They are more than block_size.
        """
        check_length(tokens if cache is None else cache.read(tokens), self.block_size)
        x = self.wte(tokens).mT  # (B, T, C) -> (B, C, T)
        skips = torch.zeros_like(x)
        for block in self.h:
            x, skip = block(x) if cache is None else block(x, cache)
            skips = skips + skip
        return self.lm_head(F.relu(self.mix(F.relu(skips.mT))))  # (B, C, T) -> (B, T, C) -> (B, T, V)
