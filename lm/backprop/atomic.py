"""The MLP with BatchNorm broken into atoms: each tensor of the forward pass has its own line in the backward pass.

The exercise of Karpathy's makemore part 4, in its names. Shapes: B batch, T time, C channels (n_embd), H hidden
channels, V vocabulary.
"""

import copy
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
        names = [name for name in NAMES if name in values]
        expected = torch.autograd.grad(values["loss"], [values[name] for name in names])
        found = backward({name: value.detach() for name, value in values.items()}, tokens, targets)
        return dict(zip(names, expected, strict=True)), found

    expected, found = both(net)
    if next(net.parameters()).dtype == torch.float64:
        return rows(expected, found, tolerances(expected, {}))
    wide, right = both(copy.deepcopy(net).double())
    table = rows(expected, found, tolerances(expected, wide))
    wrong = {row.name: row for row in rows(wide, right, tolerances(wide, {})) if not row.approximate}
    return [wrong.get(row.name, row) for row in table]


NAMES = (  # noqa: SIM905  as a list, a page
    "logprobs probs counts_sum_inv counts_sum counts norm_logits logit_maxes logits h W2 b2 hpreact bngain bnbias "
    "bnraw bnvar_inv bnvar bndiff2 bndiff bnmeani hprebn embcat W1 b1 emb C"
).split()
"""The lecture's tensors, in the order of the backward pass; without a first bias there is no b1."""


def forward(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return every tensor of the forward pass; the lecture's weights are (in, out), so W1 and W2 are transposed."""
    layers: Any = list(net.hidden) if isinstance(net, MLP) else []
    if not isinstance(net, MLP) or len(layers) != 3 or not isinstance(layers[1], BatchNorm):
        raise ValueError("the atomic level is for an lm.models.MLP with n_layer 1 and batch_norm")
    linear, norm, _ = layers
    n, m = len(tokens), len(tokens) - int(norm.bessel)
    v: dict[str, Tensor] = {"C": net.wte.weight, "W1": linear.weight.mT, "W2": net.lm_head.weight.mT}
    v |= {"b2": net.lm_head.bias, "bngain": norm.weight, "bnbias": norm.bias}
    if linear.bias is not None:
        v["b1"] = linear.bias
    v["emb"] = v["C"][tokens]  # (V, C) -> (B, T, C)
    v["embcat"] = v["emb"].flatten(1)  # (B, T C)
    v["hprebn"] = v["embcat"] @ v["W1"] + v.get("b1", 0.0)  # (B, T C) @ (T C, H) -> (B, H)
    v["bnmeani"] = v["hprebn"].sum(0, keepdim=True) / n  # (1, H)
    v["bndiff"] = v["hprebn"] - v["bnmeani"]
    v["bndiff2"] = v["bndiff"] ** 2
    v["bnvar"] = v["bndiff2"].sum(0, keepdim=True) / m  # (1, H)
    v["bnvar_inv"] = (v["bnvar"] + norm.eps) ** -0.5
    v["bnraw"] = v["bndiff"] * v["bnvar_inv"]
    v["hpreact"] = v["bngain"] * v["bnraw"] + v["bnbias"]
    v["h"] = torch.tanh(v["hpreact"])
    v["logits"] = v["h"] @ v["W2"] + v["b2"]  # (B, H) @ (H, V) -> (B, V)
    v["logit_maxes"] = v["logits"].max(1, keepdim=True).values  # (B, 1)
    v["norm_logits"] = v["logits"] - v["logit_maxes"]
    v["counts"] = v["norm_logits"].exp()
    v["counts_sum"] = v["counts"].sum(1, keepdim=True)  # (B, 1)
    v["counts_sum_inv"] = v["counts_sum"] ** -1
    v["probs"] = v["counts"] * v["counts_sum_inv"]
    v["logprobs"] = v["probs"].log()
    v["loss"] = -v["logprobs"][torch.arange(n), targets].mean()
    v["m"] = torch.tensor(float(m), dtype=v["loss"].dtype)
    return v


def backward(v: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the loss by every tensor, one line each.

    Two rules say nearly all of it. What was broadcast on the way forth is summed on the way back, and what was summed
    is broadcast. What is used twice gets two gradients, added by +=.

    Args:
        v: What `forward` returned.
        tokens: int64 (B, T).
        targets: int64 (B,).
    """
    n, m = len(tokens), v["m"]
    d: dict[str, Tensor] = {}
    d["logprobs"] = torch.zeros_like(v["logprobs"])
    d["logprobs"][torch.arange(n), targets] = -1 / n  # the mean of n of them
    d["probs"] = d["logprobs"] / v["probs"]  # log' x = 1/x
    d["counts_sum_inv"] = (d["probs"] * v["counts"]).sum(1, keepdim=True)  # was broadcast over V
    d["counts_sum"] = -d["counts_sum_inv"] * v["counts_sum"] ** -2
    d["counts"] = d["probs"] * v["counts_sum_inv"]
    d["counts"] += d["counts_sum"]  # was summed over V
    d["norm_logits"] = d["counts"] * v["counts"]  # exp' = exp
    d["logit_maxes"] = -d["norm_logits"].sum(1, keepdim=True)  # (B, 1): zero, but for rounding
    d["logits"] = d["norm_logits"].clone()
    d["logits"].scatter_add_(1, v["logits"].max(1, keepdim=True).indices, d["logit_maxes"])  # the largest one's place
    d["h"] = d["logits"] @ v["W2"].mT  # (B, V) @ (V, H) -> (B, H)
    d["W2"] = v["h"].mT @ d["logits"]  # (H, B) @ (B, V) -> (H, V)
    d["b2"] = d["logits"].sum(0)
    d["hpreact"] = d["h"] * (1 - v["h"] ** 2)  # tanh' = 1 - tanh²
    d["bngain"] = (d["hpreact"] * v["bnraw"]).sum(0)
    d["bnbias"] = d["hpreact"].sum(0)
    d["bnraw"] = d["hpreact"] * v["bngain"]
    d["bnvar_inv"] = (d["bnraw"] * v["bndiff"]).sum(0, keepdim=True)  # (1, H)
    d["bnvar"] = -0.5 * d["bnvar_inv"] * v["bnvar_inv"] ** 3  # x^-½' = -½ x^-³⁄₂
    d["bndiff2"] = (d["bnvar"] / m).expand_as(v["bndiff2"])  # was summed over B; m has Bessel's correction
    d["bndiff"] = d["bnraw"] * v["bnvar_inv"]
    d["bndiff"] += 2 * v["bndiff"] * d["bndiff2"]
    d["bnmeani"] = -d["bndiff"].sum(0, keepdim=True)  # (1, H): was broadcast over B
    d["hprebn"] = d["bndiff"] + d["bnmeani"] / n
    d["embcat"] = d["hprebn"] @ v["W1"].mT  # (B, H) @ (H, T C) -> (B, T C)
    d["W1"] = v["embcat"].mT @ d["hprebn"]  # (T C, B) @ (B, H) -> (T C, H)
    if "b1" in v:
        d["b1"] = d["hprebn"].sum(0)
    d["emb"] = d["embcat"].view_as(v["emb"])
    d["C"] = torch.zeros_like(v["C"]).index_add_(0, tokens.flatten(), d["emb"].flatten(0, 1))  # rows used many times
    return d
