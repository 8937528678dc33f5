"""Rules of attention, rotary positions and the feed-forward networks of a block.

Shapes: B batch, T time, S keys looked at, C channels (n_embd), H heads, D channels of a head (C/H), M hidden channels.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lm.backprop.activations import silu, value_and_slope
from lm.backprop.linear import drop, linear_gradients
from lm.backprop.rules import Backward, Gradients, for_products, rule, run
from lm.models.attention import CausalSelfAttention, Head, SeparateHeads
from lm.models.feed_forward import BlockMLP, SingleLayer, SwiGLU
from lm.models.parts import in_parts, precise, rows_of, turned
from lm.models.rotary import Rotary
from lm.models.seq2seq import Attention

BLOCK = 128  # queries whose attention weights are made at a time; of fewer, they are kept
AT_ONCE = 1 << 20  # attention weights that are made at a time, of as many sequences as that allows


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Backward]:
    """y = P v, P = softmax(q kᵀ / √D) over the allowed keys; those not allowed have weight 0.

    Products of matrices: dP = dy vᵀ and dv = Pᵀ dy. A row p = softmax(s) has ∂p_i/∂s_j = p_i (δ_ij - p_j), so
        ds_j = Σ_i dp_i p_i (δ_ij - p_j) = p_j (dp_j - Σ_i dp_i p_i),
    where Σ_i dp_i p_i = Σ_i (dy · v_i) p_i = dy · y, a sum over channels rather than over keys. And s = q kᵀ / √D gives
    dq = ds k / √D and dk = dsᵀ q / √D. What is not allowed has p = 0, so ds = 0.
    Dropout multiplies P by its mask on the way to y, and dP by the same.

    Args:
        q: (B, H, T, D).
        k: (B, H, S, D).
        v: (B, H, S, D).
        allowed: bool, broadcastable to (B, H, T, S), with a true in every row; None is the causal mask.
        dropout: Probability of dropping a weight.

    Returns:
        y (B, H, T, D), and a function from dy to (dq, dk, dv).
    """
    T, D = q.shape[-2:]  # noqa: N806
    if allowed is None and not dropout and T > BLOCK:
        return _attend_causal(q, k, v)
    q_, k_, v_ = (t.reshape(-1, *t.shape[-2:]) for t in (q * (1 / math.sqrt(D)), k, v))  # (B, H, T, D) -> (B H, T, D)
    scores = torch.bmm(q_, k_.mT).view(*q.shape[:3], -1)  # (B H, T, D) @ (B H, D, S) -> (B, H, T, S)
    if allowed is None:
        scores += _future(scores)
    else:
        scores.masked_fill_(~allowed, -math.inf)
    weights = scores.softmax(-1).flatten(0, 1)  # (B H, T, S)
    used, backward_drop = drop(weights, dropout)
    y = torch.bmm(used, v_)  # (B H, T, S) @ (B H, S, D) -> (B H, T, D)

    def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy_ = dy.reshape(q_.shape).to(v.dtype)
        dv = torch.bmm(used.mT, dy_)  # (B H, S, T) @ (B H, T, D) -> (B H, S, D)
        dweights = backward_drop(torch.bmm(dy_, v_.mT))  # (B H, T, S)
        dscores = softmax_backward(weights, dweights, torch.linalg.vecdot(dy_, y))
        dq, dk = torch.bmm(dscores, k_) * (1 / math.sqrt(D)), torch.bmm(dscores.mT, q_)
        return dq.view_as(q), dk.view_as(k), dv.view_as(v)

    return y.view_as(q), backward


def _future(scores: Tensor) -> Tensor:
    """Return what takes the future from scores (…, T, T): -inf there, else 0."""
    return torch.full(scores.shape[-2:], -math.inf, device=scores.device, dtype=scores.dtype).triu(1)


def softmax_backward(p: Tensor, dp: Tensor, inner: Tensor) -> Tensor:
    """ds = p (dp - Σ dp p), in dp's place; p and dp (…, T, S), the sums (…, T)."""
    return dp.sub_(inner.unsqueeze(-1)).mul_(p)


def _attend_causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Backward]:
    """`attend` to the past, some queries of some sequences at a time: no weights (T, T) are kept, but made again.

    The weights of a part stay in a processor's cache. Queries of a block see no keys behind its end, so nearly half of
    the products are not computed at all.
    """
    B, H, T, D = q.shape  # noqa: N806
    scale = 1 / math.sqrt(D)
    q, k, v = ((q * scale).contiguous(), k.contiguous(), v.contiguous())  # each (B, H, T, D)
    y = q.new_empty(B, T, H, D).transpose(1, 2)  # in memory heads are side by side, as the projection wants them
    for some, start, stop in _parts(q):
        weights = _block_weights(q[some, :, start:stop], k[some, :, :stop], start)
        y[some, :, start:stop] = torch.bmm(weights, v[some, :, :stop].flatten(0, 1)).unflatten(0, (-1, H))

    def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy = dy.to(v.dtype).contiguous()
        inner = torch.linalg.vecdot(dy, y)  # (B, H, T)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for some, start, stop in _parts(q):
            q_, dy_ = (t[some, :, start:stop].flatten(0, 1) for t in (q, dy))  # (b H, t, D)
            k_, v_ = (t[some, :, :stop].flatten(0, 1) for t in (k, v))  # (b H, s, D)
            weights = _block_weights(q[some, :, start:stop], k[some, :, :stop], start)  # (b H, t, s)
            dscores = softmax_backward(weights, torch.bmm(dy_, v_.mT), inner[some, :, start:stop].flatten(0, 1))
            dq[some, :, start:stop] = torch.bmm(dscores, k_).mul_(scale).unflatten(0, (-1, H))
            for total, part in ((dk, torch.bmm(dscores.mT, q_)), (dv, torch.bmm(weights.mT, dy_))):  # (b H, s, D)
                place, part = total[some, :, :stop], part.unflatten(0, (-1, H))
                place.copy_(part) if stop == T else place.add_(part)  # the last queries, which see all keys, are first
        return dq, dk, dv

    return y, backward


def _parts(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Yield which sequences, from which query, to which: later queries first."""
    B, H, T = q.shape[:3]  # noqa: N806
    whole = torch.compiler.is_compiling() or q.device.type != "cpu"
    count = B if whole else max(1, AT_ONCE // (H * BLOCK * T))
    for first in range(0, B, count):
        for start in reversed(range(0, T, BLOCK)):
            yield slice(first, first + count), start, min(T, start + BLOCK)


def _block_weights(q: Tensor, k: Tensor, start: int) -> Tensor:
    """Return attention weights (b H, t, s) of scaled queries (b, H, t, D), from a position on, to keys (b, H, s, D)."""
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    last = scores[:, :, start:]  # keys of the queries' own positions (b H, t, t); they see all earlier ones
    last += _future(last)
    return scores.softmax(-1)


def split_heads(x: Tensor, head_size: int) -> Tensor:
    """Map (B, T, H D) to (B, H, T, D)."""
    return x.unflatten(-1, (-1, head_size)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Map (B, H, T, D) to (B, T, H D)."""
    return x.transpose(1, 2).flatten(2)


@rule(CausalSelfAttention)
def causal_self_attention(
    attn: CausalSelfAttention, grads: Gradients, x: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Backward]:
    """One projection to all heads' q, k, v; `attend`; heads side by side; another projection.

    Splitting and joining only move numbers, so the gradients of q, k and v stand side by side where these stood. A key
    head that a group of query heads shares was copied for each, so it gets the sum of the copies' gradients.
    """
    qkv, backward_qkv = run(attn.c_attn, grads, x)  # (B, T, C) -> (B, T, C + 2 H' D)
    q, k, v = (split_heads(part, attn.head_size) for part in qkv.split(attn.widths, dim=2))  # each (B, H or H', T, D)
    q, k, backward_turn = _norm_and_turn(attn, grads, q, k)
    group = attn.n_head // attn.n_kv_head
    k, v = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (k, v))  # (B, H', …) -> (B, H, …)
    v, backward_keys = run(attn.key_dropout, grads, v)
    y, backward_attend = attend(q, k, v, allowed, attn.dropout if attn.training else 0.0)
    y, backward_proj = run(attn.c_proj, grads, join_heads(y))  # (B, T, C)
    y, backward_drop = run(attn.resid_dropout, grads, y)

    def backward(dy: Tensor) -> Tensor:
        dy = backward_proj(backward_drop(dy))
        dq, dk, dv = backward_attend(split_heads(dy, attn.head_size))
        dv = backward_keys(dv)
        if group > 1:
            dk, dv = (part.unflatten(1, (-1, group)).sum(2) for part in (dk, dv))  # (B, H, …) -> (B, H', …)
        dq, dk = backward_turn(dq, dk)
        return backward_qkv(torch.cat([join_heads(part) for part in (dq, dk, dv)], dim=2))

    return y, backward


def _norm_and_turn(
    attn: CausalSelfAttention, grads: Gradients, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor, Backward]:
    """QK-norm and rotary positions, where attention has them, of queries and keys alike."""
    steps: list[tuple[Backward, Backward]] = []
    if attn.q_norm is not None and attn.k_norm is not None:
        (q, backward_q), (k, backward_k) = run(attn.q_norm, grads, q), run(attn.k_norm, grads, k)
        steps.append((backward_q, backward_k))
    if attn.rotary is not None:
        (q, backward_q), (k, backward_k) = run(attn.rotary, grads, q), run(attn.rotary, grads, k)
        steps.append((backward_q, backward_k))

    def backward(dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
        for backward_q, backward_k in reversed(steps):
            dq, dk = backward_q(dq), backward_k(dk)
        return dq, dk

    return q, k, backward


@rule(Rotary)
def rotary(layer: Rotary, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = x cos + R x sin, where R turns each pair by 90 degrees: (a, b) -> (-b, a).

    The pair is turned by an angle, an orthogonal map; its transpose turns back, by the angle of the opposite sine.
    """
    cos, sin = layer.angles(x.shape[-2])
    return turned(x, cos, sin), lambda dy: turned(dy, cos, -sin)


@rule(Head)
def head(layer: Head, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """One head: x is read three times, so dx is the sum of three gradients."""
    q, backward_q = run(layer.query, grads, x)
    k, backward_k = run(layer.key, grads, x)
    v, backward_v = run(layer.value, grads, x)
    p = layer.dropout.p if layer.training else 0.0
    y, backward_attend = attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), dropout=p)  # with H = 1

    def backward(dy: Tensor) -> Tensor:
        dq, dk, dv = (part.squeeze(1) for part in backward_attend(dy.unsqueeze(1)))
        return backward_q(dq) + backward_k(dk) + backward_v(dv)

    return y.squeeze(1), backward


@rule(SeparateHeads)
def separate_heads(layer: SeparateHeads, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """Heads side by side: each gets its own channels of dy, and all that they say of x adds up."""
    ys, backwards = zip(*(run(one, grads, x) for one in layer.heads), strict=True)
    y, backward_proj = run(layer.c_proj, grads, torch.cat(ys, dim=2))  # H of (B, T, D) -> (B, T, C)
    y, backward_drop = run(layer.resid_dropout, grads, y)

    def backward(dy: Tensor) -> Tensor:
        parts = backward_proj(backward_drop(dy)).chunk(len(backwards), dim=2)
        return torch.stack([back(part) for back, part in zip(backwards, parts, strict=True)]).sum(0)

    return y, backward


@rule(Attention)
def attention(layer: Attention, grads: Gradients, x: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Backward]:
    """Attention to a memory: dx comes by the queries, dmemory by keys and values.

    Who may look at nothing has output 0, a constant: no gradient passes there.
    """
    head_size = x.shape[-1] // layer.n_head
    q, backward_q = run(layer.c_q, grads, x)
    kv, backward_kv = run(layer.c_kv, grads, memory)
    q, (k, v) = split_heads(q, head_size), (split_heads(part, head_size) for part in kv.chunk(2, dim=2))
    blind = ~mask.any(dim=-1, keepdim=True)  # (…, T, S) -> (…, T, 1)
    y, backward_attend = attend(q, k, v, mask | blind, layer.dropout if layer.training else 0.0)
    y, backward_proj = run(layer.c_proj, grads, join_heads(y.masked_fill(blind, 0.0)))
    y, backward_drop = run(layer.resid_dropout, grads, y)

    def backward(dy: Tensor) -> tuple[Tensor, Tensor]:
        dy = split_heads(backward_proj(backward_drop(dy)), head_size).masked_fill(blind, 0.0)
        dq, dk, dv = backward_attend(dy)
        return backward_q(join_heads(dq)), backward_kv(torch.cat([join_heads(dk), join_heads(dv)], dim=2))

    return y, backward


@rule(BlockMLP)
def mlp(layer: BlockMLP, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """x -> h = x W₁ᵀ -> a = f(h) -> y = a W₂ᵀ, each step's gradient as in its own rule.

    a, the largest tensor of a block, is not kept: its value and slope are made again from h, at once.
    """
    h, backward_fc = run(layer.c_fc, grads, x)  # (B, T, C) -> (B, T, M)
    y, _ = run(layer.c_proj, grads, run(layer.activation, grads, h)[0])  # (B, T, M) -> (B, T, C)
    y, backward_drop = run(layer.dropout, grads, y)

    def backward(dy: Tensor) -> Tensor:
        dy = for_products(backward_drop(dy))
        da, a = dy @ layer.c_proj.weight, h.new_empty(h.shape)  # (B, T, C) -> (B, T, M)

        def part(h: Tensor, a: Tensor, da: Tensor) -> None:
            value, slope = value_and_slope(layer.activation, grads, h)
            a.copy_(value)
            torch.mul(slope, da, out=da)

        in_parts(part, rows_of(h), rows_of(a), rows_of(da))
        linear_gradients(layer.c_proj, grads, a, dy)
        del a
        return backward_fc(da)  # (B, T, M) -> (B, T, C)

    return y, backward


@rule(SwiGLU)
def swiglu(layer: SwiGLU, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = (silu(g) ∘ u) W₂ᵀ with g = x W_gᵀ, u = x W_uᵀ: by the product rule du = da silu(g), dg = da u silu'(g).

    x is read twice: its gradients add up.
    """
    gate, backward_gate = run(layer.w_gate, grads, x)  # (B, T, C) -> (B, T, M)
    up, backward_up = run(layer.w_up, grads, x)
    y, _ = run(layer.c_proj, grads, F.silu(gate) * up)  # (B, T, M) -> (B, T, C)
    y, backward_drop = run(layer.dropout, grads, y)

    def backward(dy: Tensor) -> Tensor:
        dy = for_products(backward_drop(dy))
        da, a, dup = dy @ layer.c_proj.weight, up.new_empty(up.shape), up.new_empty(up.shape)  # (B, T, C) -> (B, T, M)

        def part(gate: Tensor, up: Tensor, a: Tensor, da: Tensor, dup: Tensor) -> None:
            value, slope = silu(precise(gate))
            a.copy_(value * up)
            dup.copy_(value.mul_(da))
            da.copy_(slope.mul_(da).mul_(up))

        in_parts(part, *(rows_of(t) for t in (gate, up, a, da, dup)))
        linear_gradients(layer.c_proj, grads, a, dy)
        return backward_gate(da) + backward_up(dup)

    return y, backward


@rule(SingleLayer)
def single_layer(layer: SingleLayer, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """One linear layer and a ReLU."""
    h, backward_fc = run(layer.c_fc, grads, x)
    positive = torch.relu(h)
    y, backward_drop = run(layer.dropout, grads, positive)
    return y, lambda dy: backward_fc(backward_drop(dy) * (positive > 0))
