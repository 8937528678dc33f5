"""Causal self-attention: all heads from one projection, or head by head, written out.

Vaswani et al., "Attention Is All You Need" (2017). Parameter names are GPT-2's (c_attn, c_proj).

Shapes: B batch, T time, S keys (T and, with a cache, those before), C channels (n_embd), H heads, D channels of a head
(C/H).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models.cache import Cache
from lm.models.dropout import Dropout
from lm.models.masks import past
from lm.models.norms import RMSNorm
from lm.models.rotary import Rotary

Attention = Literal["batched", "separate"]


def causal_weights(q: Tensor, k: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return how much each position attends to itself and to each earlier one.

    Args:
        q: Of the last T positions, (…, T, D).
        k: Of all, (…, S, D).
        allowed: The attention mask, broadcastable to (…, T, S); causal by default.

    Returns:
        (…, T, S), rows that sum to 1.
    """
    T, D, S = *q.shape[-2:], k.shape[-2]  # noqa: N806
    scores = q @ k.mT / math.sqrt(D)  # (…, T, D) @ (…, D, S) -> (…, T, S)
    allowed = past(T, S, q.device) if allowed is None else allowed
    return scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to earlier ones; all heads come from one projection."""

    def __init__(
        self,
        *,
        n_embd: int,
        n_head: int,
        dropout: float,
        bias: bool,
        attention_bias: bool | None = None,
        n_kv_head: int | None = None,
        projection: bool = True,
        qk_norm: bool = False,
        key_dropout: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_head if n_kv_head is None else n_kv_head
        self.head_size = n_embd // n_head
        self.dropout = 0.0 if key_dropout else dropout
        self.key_dropout = Dropout(dropout if key_dropout else 0.0, rows=True)
        self.heads = [n_head, self.n_kv_head, self.n_kv_head]
        self.widths = [count * self.head_size for count in self.heads]
        attention_bias = bias if attention_bias is None else attention_bias
        self.c_attn = nn.Linear(n_embd, sum(self.widths), bias=attention_bias)  # query, key and value of all heads
        self.q_norm = RMSNorm(self.head_size, eps=1e-5) if qk_norm else None
        self.k_norm = RMSNorm(self.head_size, eps=1e-5) if qk_norm else None
        self.rotary = rotary
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias) if projection else nn.Identity()
        self.resid_dropout = Dropout(dropout)

    def qkv(
        self, x: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query (B, H, T, D), key and value (B, H, S, D) of all heads, from x (B, T, C); see `forward`.

        With a cache and grouped queries, those of a single token are (B, H', H/H', D): a group is as many queries to
        the key that it shares, (B, H', S, D), so that nothing is copied for each token.
        """
        parts = self.c_attn(x).unflatten(2, (-1, self.head_size))  # (B, T, C) -> (B, T, H + 2 H', D), H' key heads
        q, k, v = parts.transpose(1, 2).split(self.heads, dim=1)  # -> (B, H, T, D), two (B, H', T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            where = None if positions is None else positions.unsqueeze(-2)  # one angle for all heads
            q, k = self.rotary(q, where), self.rotary(k, where)
        if cache is not None:
            if x.dtype.itemsize < 4:  # few queries are slow in 16 bits: on a GPU, cuDNN makes a plan for each length
                q, k, v = q.float(), k.float(), v.float()
            k, v = cache.extend(self, k, v)  # (B, H', T, D) -> (B, H', S, D)
        if self.n_kv_head < self.n_head:  # H / H' neighbouring query heads share a key and a value
            group = self.n_head // self.n_kv_head
            if cache is not None and x.shape[1] == 1:
                return q.unflatten(1, (-1, group)).squeeze(3), k, v  # (B, H, 1, D) -> (B, H', H/H', D)
            k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))  # (B, H', S, D) -> (B, H, S, D)
        return q, k, v

    def weights(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the attention weights (B, H, T, T) of x (B, T, C), without dropout."""
        q, k, _ = self.qkv(x)
        return causal_weights(q, k, allowed)

    def forward(
        self,
        x: Tensor,
        allowed: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: (B, T, C).
            allowed: The attention mask, bool (B, 1, T, S); causal by default.
            positions: Of x, int64 (T,) or, where rows differ, (B, T); 0 to T - 1 by default.
            cache: Has the keys and values of earlier positions, and takes those of x.
        """
        q, k, v = self.qkv(x, positions, cache)  # (B, H, T, D), two (B, H, S, D)
        T, S = x.shape[1], k.shape[2]  # noqa: N806
        if allowed is None and 1 < T < S:  # a single query may see all keys
            allowed = past(T, S, x.device)
        if cache is not None and allowed is not None and T == 1 and x.device.type == "cpu":
            # the fused kernel's bits depend on which thread computes a text: each one's buffer is aligned otherwise
            y = causal_weights(q, k, allowed) @ v  # (B, H, 1, S) @ (B, H, S, D) -> (B, H, 1, D)
        else:
            p, causal = self.dropout if self.training else 0.0, allowed is None and T == S
            v = self.key_dropout(v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p, is_causal=causal)
        y = y.reshape(len(x), self.n_head, T, -1)  # also where a group of heads was so many queries
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C): heads side by side
        if cache is not None:
            y = y.type_as(x)
        return self.resid_dropout(self.c_proj(y))


class Head(nn.Module):
    """One head of self-attention, written out."""

    def __init__(self, *, n_embd: int, head_size: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=bias)
        self.key = nn.Linear(n_embd, head_size, bias=bias)
        self.value = nn.Linear(n_embd, head_size, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights (B, T, T) of x (B, T, C), without dropout."""
        return causal_weights(self.query(x), self.key(x))

    def forward(self, x: Tensor, allowed: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, D).

        Args:
            x: (B, T, C).
            allowed: The attention mask, bool (B, T, S); causal by default.
            cache: Has the keys and values of earlier positions, and takes those of x.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, C) -> each (B, T, D)
        if cache is not None:
            k, v = cache.extend(self, k, v)  # (B, T, D) -> (B, S, D)
        return self.dropout(causal_weights(q, k, allowed)) @ v  # (B, T, S) @ (B, S, D) -> (B, T, D)


class SeparateHeads(nn.Module):
    """The same attention as `CausalSelfAttention`, one module a head: slower, and easier to read."""

    def __init__(
        self,
        *,
        n_embd: int,
        n_head: int,
        dropout: float,
        bias: bool,
        attention_bias: bool | None = None,
        projection: bool = True,
    ) -> None:
        super().__init__()
        attention_bias = bias if attention_bias is None else attention_bias
        self.heads = nn.ModuleList(
            Head(n_embd=n_embd, head_size=n_embd // n_head, dropout=dropout, bias=attention_bias) for _ in range(n_head)
        )
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias) if projection else nn.Identity()
        self.resid_dropout = Dropout(dropout)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights (B, H, T, T) of x (B, T, C), without dropout."""
        return torch.stack([head.weights(x) for head in self.heads], dim=1)  # type: ignore[operator]

    def forward(
        self, x: Tensor, allowed: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C); see `CausalSelfAttention`, but positions make no difference."""
        allowed = None if allowed is None else allowed.squeeze(1)  # (B, 1, T, S) -> (B, T, S)
        heads = [head(x, allowed, cache) for head in self.heads]  # H of (B, T, D)
        y = torch.cat(heads, dim=2)  # -> (B, T, C): heads side by side
        return self.resid_dropout(self.c_proj(y))


def make_attention(
    kind: Attention,
    *,
    n_kv_head: int | None = None,
    qk_norm: bool = False,
    key_dropout: bool = False,
    rotary: Rotary | None = None,
    **common: Any,
) -> nn.Module:
    """Return the attention of a block; what is not in common is for "batched" alone."""
    if kind == "separate":
        return SeparateHeads(**common)
    return CausalSelfAttention(n_kv_head=n_kv_head, qk_norm=qk_norm, key_dropout=key_dropout, rotary=rotary, **common)
