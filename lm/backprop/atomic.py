"""The MLP with BatchNorm broken into atoms: each tensor has its own line forward, and its own gradient backward.

The exercise of Karpathy's makemore part 4, in its names. Two rules say nearly all of it. What was broadcast on the way
forth is summed on the way back, and what was summed is broadcast. What is used twice gets two gradients, added.

Shapes: B batch, T time, C channels (n_embd), H hidden channels, V vocabulary.
"""
# ruff: noqa: N802, N803  names of the lecture

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lm.backprop.compare import Row, rows, tolerances
from lm.models import MLP
from lm.models.layers import BatchNorm


def against_autograd(net: nn.Module, tokens: Tensor, targets: Tensor) -> list[Row]:
    """Compare the gradient by every tensor with autograd's, from the loss back to the embedding.

    Args:
        net: An `MLP` of one hidden layer with BatchNorm, in training mode.
        tokens: int64 (B, T), T being the context.
        targets: int64 (B,).

    Raises:
        ValueError: It is another network.
    """

    def both(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = forward(net, tokens, targets)
        names = [name for name in GRADIENTS if name in values]
        expected = torch.autograd.grad(values["loss"], [values[name] for name in names])
        found = backward({k: x.detach() if isinstance(x, Tensor) else x for k, x in values.items()})
        return dict(zip(names, expected, strict=True)), found

    expected, found = both(net)
    if next(net.parameters()).dtype == torch.float64:
        return rows(expected, found, tolerances(expected, {}))
    wide, right = both(copy.deepcopy(net).double())
    table = rows(expected, found, tolerances(expected, wide))
    wrong = {row.name: row for row in rows(wide, right, tolerances(wide, {})) if not row.approximate}
    return [wrong.get(row.name, row) for row in table]


FORWARD: dict[str, Callable[..., Tensor]] = {
    "emb": lambda C, tokens: C[tokens],  # (V, C) -> (B, T, C)
    "embcat": lambda emb: emb.flatten(1),  # (B, T C)
    "hprebn": lambda embcat, W1, b1: embcat @ W1 + b1,  # (B, T C) @ (T C, H) -> (B, H)
    "bnmeani": lambda hprebn, n: hprebn.sum(0, keepdim=True) / n,  # (1, H)
    "bndiff": lambda hprebn, bnmeani: hprebn - bnmeani,
    "bndiff2": lambda bndiff: bndiff**2,
    "bnvar": lambda bndiff2, m: bndiff2.sum(0, keepdim=True) / m,  # (1, H)
    "bnvar_inv": lambda bnvar, eps: (bnvar + eps) ** -0.5,
    "bnraw": lambda bndiff, bnvar_inv: bndiff * bnvar_inv,
    "hpreact": lambda bngain, bnraw, bnbias: bngain * bnraw + bnbias,
    "h": lambda hpreact: torch.tanh(hpreact),
    "logits": lambda h, W2, b2: h @ W2 + b2,  # (B, H) @ (H, V) -> (B, V)
    "logit_maxes": lambda logits: logits.max(1, keepdim=True).values,  # (B, 1)
    "norm_logits": lambda logits, logit_maxes: logits - logit_maxes,
    "counts": lambda norm_logits: norm_logits.exp(),
    "counts_sum": lambda counts: counts.sum(1, keepdim=True),  # (B, 1)
    "counts_sum_inv": lambda counts_sum: counts_sum**-1,
    "probs": lambda counts, counts_sum_inv: counts * counts_sum_inv,
    "logprobs": lambda probs: probs.log(),
    "loss": lambda logprobs, targets: -logprobs[torch.arange(len(targets)), targets].mean(),
}
"""Each tensor of the forward pass, of those before it; n is B, and m is n or, with Bessel's correction, n - 1."""


def forward(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return every tensor of the forward pass; the lecture's weights are (in, out), so W1 and W2 are transposed."""
    layers: Any = list(net.hidden) if isinstance(net, MLP) else []
    if not isinstance(net, MLP) or len(layers) != 3 or not isinstance(layers[1], BatchNorm):
        raise ValueError("the atomic level is for an lm.models.MLP with n_layer 1 and batch_norm")
    linear, norm, _ = layers
    v: dict[str, Any] = {"C": net.wte.weight, "W1": linear.weight.mT, "W2": net.lm_head.weight.mT}
    v |= {"b2": net.lm_head.bias, "bngain": norm.weight, "bnbias": norm.bias}
    v["b1"] = 0.0 if linear.bias is None else linear.bias
    v |= {"n": len(tokens), "m": len(tokens) - int(norm.bessel), "eps": norm.eps, "tokens": tokens, "targets": targets}
    for name, step in FORWARD.items():
        v[name] = called(step, v)
    if linear.bias is None:
        del v["b1"]
    return v


def called(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a function with the values that its parameters name."""
    return function(**{name: values[name] for name in inspect.signature(function).parameters})


def dlogprobs(logprobs: Tensor, targets: Tensor) -> Tensor:
    """The loss is minus the mean of n entries, one a row: each of them gets -1/n, all others nothing."""
    d = torch.zeros_like(logprobs)
    d[torch.arange(len(targets)), targets] = -1 / len(targets)
    return d


def dprobs(dlogprobs: Tensor, probs: Tensor) -> Tensor:
    """log' x = 1/x: where a label had little probability, its gradient is boosted."""
    return dlogprobs / probs


def dcounts_sum_inv(dprobs: Tensor, counts: Tensor) -> Tensor:
    """A column (B, 1) that was broadcast over V, so its gradient is the sum over V."""
    return (dprobs * counts).sum(1, keepdim=True)


def dcounts_sum(dcounts_sum_inv: Tensor, counts_sum: Tensor) -> Tensor:
    """(1/x)' = -1/x²."""
    return -dcounts_sum_inv * counts_sum**-2


def dcounts(dprobs: Tensor, dcounts_sum: Tensor, counts_sum_inv: Tensor) -> Tensor:
    """It is used twice: by probs, and by the sum, which hands its gradient to each of the V that it added."""
    return dprobs * counts_sum_inv + dcounts_sum


def dnorm_logits(dcounts: Tensor, counts: Tensor) -> Tensor:
    """exp' = exp, which the forward pass has left."""
    return dcounts * counts


def dlogit_maxes(dnorm_logits: Tensor) -> Tensor:
    """It was subtracted from each of a row's V logits: minus the sum. In the whole, zero but for rounding."""
    return -dnorm_logits.sum(1, keepdim=True)


def dlogits(dnorm_logits: Tensor, dlogit_maxes: Tensor, logits: Tensor) -> Tensor:
    """It is used twice: by the difference, and by the maximum, which is the one logit in its place."""
    return dnorm_logits.scatter_add(1, logits.max(1, keepdim=True).indices, dlogit_maxes)


def dh(dlogits: Tensor, W2: Tensor) -> Tensor:
    """h_ni meets every output o: Σ_o dlogits_no W2_io. The shapes leave no other product."""
    return dlogits @ W2.mT  # (B, V) @ (V, H) -> (B, H)


def dW2(dlogits: Tensor, h: Tensor) -> Tensor:
    """W2_io meets every row n: Σ_n h_ni dlogits_no."""
    return h.mT @ dlogits  # (H, B) @ (B, V) -> (H, V)


def db2(dlogits: Tensor) -> Tensor:
    """It was broadcast over the rows: their sum."""
    return dlogits.sum(0)


def dhpreact(dh: Tensor, h: Tensor) -> Tensor:
    """tanh' = 1 - tanh², of its output."""
    return dh * (1 - h**2)


def dbngain(dhpreact: Tensor, bnraw: Tensor, bngain: Tensor) -> Tensor:
    """It was broadcast over the rows: the sum of what multiplies it."""
    return (dhpreact * bnraw).sum_to_size(bngain.shape)


def dbnbias(dhpreact: Tensor, bnbias: Tensor) -> Tensor:
    """It was broadcast over the rows: their sum."""
    return dhpreact.sum_to_size(bnbias.shape)


def dbnraw(dhpreact: Tensor, bngain: Tensor) -> Tensor:
    """A factor's gradient is the other factor; the broadcast is right as it is."""
    return dhpreact * bngain


def dbnvar_inv(dbnraw: Tensor, bndiff: Tensor) -> Tensor:
    """It was broadcast over the rows: the sum of what multiplies it, (1, H)."""
    return (dbnraw * bndiff).sum(0, keepdim=True)


def dbnvar(dbnvar_inv: Tensor, bnvar_inv: Tensor) -> Tensor:
    """(x^-½)' = -½ x^-³⁄₂, the third power of what the forward pass has left."""
    return -0.5 * dbnvar_inv * bnvar_inv**3


def dbndiff2(dbnvar: Tensor, bndiff2: Tensor, m: int) -> Tensor:
    """It was summed over the rows, so each gets the sum's gradient, divided by m as the sum was."""
    return (dbnvar / m).expand_as(bndiff2)


def dbndiff(dbnraw: Tensor, dbndiff2: Tensor, bnvar_inv: Tensor, bndiff: Tensor) -> Tensor:
    """It is used twice: by bnraw, and by its square."""
    return dbnraw * bnvar_inv + 2 * bndiff * dbndiff2


def dbnmeani(dbndiff: Tensor) -> Tensor:
    """It was subtracted from every row: minus the sum, (1, H)."""
    return -dbndiff.sum(0, keepdim=True)


def dhprebn(dbndiff: Tensor, dbnmeani: Tensor, n: int) -> Tensor:
    """It is used twice: by the difference, and by the mean, of which each row is a part of 1/n."""
    return dbndiff + dbnmeani / n


def dembcat(dhprebn: Tensor, W1: Tensor) -> Tensor:
    """As dh."""
    return dhprebn @ W1.mT  # (B, H) @ (H, T C) -> (B, T C)


def dW1(dhprebn: Tensor, embcat: Tensor) -> Tensor:
    """As dW2."""
    return embcat.mT @ dhprebn  # (T C, B) @ (B, H) -> (T C, H)


def db1(dhprebn: Tensor) -> Tensor:
    """As db2. In the whole, zero but for rounding: BatchNorm takes out whatever shifts a channel."""
    return dhprebn.sum(0)


def demb(dembcat: Tensor, emb: Tensor) -> Tensor:
    """The same numbers in another shape."""
    return dembcat.view_as(emb)


def dC(demb: Tensor, C: Tensor, tokens: Tensor) -> Tensor:
    """A row is read wherever its token stands, and collects the sum of all those gradients."""
    return torch.zeros_like(C).index_add_(0, tokens.flatten(), demb.flatten(0, 1))


GRADIENTS: dict[str, Callable[..., Tensor]] = {
    one.__name__[1:]: one
    for one in (
        dlogprobs, dprobs, dcounts_sum_inv, dcounts_sum, dcounts, dnorm_logits, dlogit_maxes, dlogits, dh, dW2, db2,
        dhpreact, dbngain, dbnbias, dbnraw, dbnvar_inv, dbnvar, dbndiff2, dbndiff, dbnmeani, dhprebn, dembcat, dW1, db1,
        demb, dC,
    )
}  # fmt: skip
"""The gradient by each of the lecture's tensors, in the order of the backward pass."""


def backward(v: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the gradient of the loss by every tensor.

    Args:
        v: What `forward` returned; without a first bias there is no b1.
    """
    known = dict(v)
    for name, gradient in GRADIENTS.items():
        if name in v:
            known[f"d{name}"] = called(gradient, known)
    return {name: known[f"d{name}"] for name in GRADIENTS if name in v}
