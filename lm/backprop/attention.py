"""Rules of attention, rotary positions and the feed-forward networks of a block.

Shapes: B batch, T time, S keys looked at, C channels (n_embd), H heads, D channels of a head (C/H), M hidden channels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lm.backprop.activations import silu, value_and_slope
from lm.backprop.linear import drop, linear_backward
from lm.backprop.rules import Backward, Gradients, precise, rule, run
from lm.models.attention import CausalSelfAttention, Head, SeparateHeads
from lm.models.feed_forward import BlockMLP, SingleLayer, SwiGLU
from lm.models.rotary import Rotary
from lm.models.seq2seq import Attention

BLOCK = 128  # queries whose attention weights are made again at a time; of fewer, they are kept


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Backward]:
    """y = P v, P = softmax(q kᵀ / √D) over the allowed keys; those not allowed have weight 0.

    Products of matrices: dP = dy vᵀ and dv = Pᵀ dy. A row p = softmax(s) has ∂p_i/∂s_j = p_i (δ_ij - p_j), so
        ds_j = Σ_i dp_i p_i (δ_ij - p_j) = p_j (dp_j - Σ_i dp_i p_i),
    and s = q kᵀ / √D gives dq = ds k / √D and dk = dsᵀ q / √D. What is not allowed has p = 0, so ds = 0.
    Dropout multiplies P by its mask on the way forth, and dP on the way back.

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
    scores = precise(torch.bmm(q_, k_.mT)).view(*q.shape[:3], -1)  # (B H, T, D) @ (B H, D, S) -> (B, H, T, S)
    if allowed is None:
        scores += _future(scores, 0)
    else:
        scores.masked_fill_(~allowed, -math.inf)
    weights = scores.softmax(-1)
    backward_drop: Backward
    dropped, backward_drop = drop(weights, dropout) if dropout else (weights, lambda dy: dy)
    used = dropped.flatten(0, 1).to(v.dtype)  # (B H, T, S)
    y = torch.bmm(used, v_).view_as(q)  # (B H, T, S) @ (B H, S, D) -> (B, H, T, D)

    def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dy_ = dy.reshape(q_.shape)
        dv = torch.bmm(used.mT, dy_)  # (B H, S, T) @ (B H, T, D) -> (B H, S, D)
        dweights = backward_drop(precise(torch.bmm(dy_, v_.mT)).view_as(weights))  # (B, H, T, S)
        dscores = softmax_backward(weights, dweights).flatten(0, 1).to(k.dtype)
        dq, dk = torch.bmm(dscores, k_) * (1 / math.sqrt(D)), torch.bmm(dscores.mT, q_)
        return dq.view_as(q), dk.view_as(k), dv.view_as(v)

    return y, backward


def _future(scores: Tensor, start: int) -> Tensor:
    """Return what takes the future from scores (…, t, S) of queries that begin at a position: -inf there, else 0."""
    return torch.full(scores.shape[-2:], -math.inf, device=scores.device, dtype=scores.dtype).triu(start + 1)


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """ds = p (dp - Σ dp p), in dp's place."""
    inner = torch.linalg.vecdot(dp, p).unsqueeze(-1)
    return dp.sub_(inner).mul_(p)


def _attend_causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Backward]:
    """`attend` to the past, which keeps no weights (T, T): the backward pass makes them again, some queries at a time.

    Queries at the block's positions see no keys behind its end, so half of the products are not computed at all.
    """
    T, D = q.shape[-2:]  # noqa: N806
    scale = 1 / math.sqrt(D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def backward(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        all_q, all_k, all_v, all_dy = (
            t.reshape(-1, T, D) for t in (q * scale, k, v, dy.to(v.dtype))
        )  # (B, H, T, D) -> (B H, T, D)
        dq, dk, dv = torch.empty_like(all_q), torch.empty_like(all_k), torch.empty_like(all_v)
        for start in reversed(range(0, T, BLOCK)):
            stop = min(T, start + BLOCK)
            q_, dy_ = all_q[:, start:stop], all_dy[:, start:stop]  # (B H, t, D)
            k_, v_ = all_k[:, :stop], all_v[:, :stop]  # (B H, s, D)
            scores = precise(torch.bmm(q_, k_.mT))  # (B H, t, s)
            weights = scores.add_(_future(scores, start)).softmax(-1)
            dscores = softmax_backward(weights, precise(torch.bmm(dy_, v_.mT))).to(q.dtype)
            dq[:, start:stop] = torch.bmm(dscores, k_) * scale  # (B H, t, s) @ (B H, s, D)
            old = 0 if stop == T else 1  # the last queries see all keys; what came before is added to
            dk[:, :stop].baddbmm_(dscores.mT, q_, beta=old)  # (B H, s, t) @ (B H, t, D)
            dv[:, :stop].baddbmm_(weights.to(v.dtype).mT, dy_, beta=old)
        return dq.view_as(q), dk.view_as(k), dv.view_as(v)

    return y, backward


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
    y, backward_attend = attend(q, k, v, allowed, attn.dropout if attn.training else 0.0)
    y, backward_proj = run(attn.c_proj, grads, join_heads(y))  # (B, T, C)
    y, backward_drop = run(attn.resid_dropout, grads, y)

    def backward(dy: Tensor) -> Tensor:
        dy = backward_proj(backward_drop(dy))
        dq, dk, dv = backward_attend(split_heads(dy, attn.head_size))
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
        kind = q.dtype
        (q, backward_q), (k, backward_k) = run(attn.q_norm, grads, q), run(attn.k_norm, grads, k)
        q, k = q.to(kind), k.to(kind)
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

    The pair is turned by an angle, an orthogonal map; its transpose turns back: dx = dy cos + Rᵀ (dy sin), where
    Rᵀ (a, b) = (b, -a).
    """
    T = x.shape[-2]  # noqa: N806

    def backward(dy: Tensor) -> Tensor:
        first, second = (dy * layer.sin[:T]).chunk(2, dim=-1)
        return dy * layer.cos[:T] + torch.cat([second, -first], dim=-1)

    return layer(x), backward


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
        a, slope = value_and_slope(layer.activation, grads, h)
        da = linear_backward(layer.c_proj, grads, a, backward_drop(dy))  # (B, T, C) -> (B, T, M)
        del a
        return backward_fc(slope.mul_(da))  # (B, T, M) -> (B, T, C)

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
        value, slope = silu(precise(gate))
        da = linear_backward(layer.c_proj, grads, value * up, backward_drop(dy))  # (B, T, C) -> (B, T, M)
        return backward_gate(slope.mul_(da).mul_(up)) + backward_up(value.mul_(da))

    return y, backward


@rule(SingleLayer)
def single_layer(layer: SingleLayer, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """One linear layer and a ReLU."""
    h, backward_fc = run(layer.c_fc, grads, x)
    positive = torch.relu(h)
    y, backward_drop = run(layer.dropout, grads, positive)
    return y, lambda dy: backward_fc(backward_drop(dy) * (positive > 0))
