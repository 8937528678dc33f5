"""Exercises: attention, and a block of GPT made of what came before."""
# ruff: noqa: N802, N803  names of matrices

import math

import torch
from torch import Tensor, nn

from lm.backprop import norms
from lm.backprop.attention import softmax_backward
from lm.course.exercise import Blank, Exercise, Terms, Values
from lm.course.layers import B, C, T, layer_norm, random, through_norm


def _masked(scores: Tensor) -> Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def dv(dy: Tensor, weights: Tensor) -> Tensor:
    """y = P v: a product of matrices, dv = Pᵀ dy."""
    return weights.mT @ dy


def dweights(dy: Tensor, v: Tensor) -> Tensor:
    """y = P v: dP = dy vᵀ."""
    return dy @ v.mT


def dscores(dweights: Tensor, weights: Tensor) -> Tensor:
    """∂p_i/∂s_j = p_i (δ_ij - p_j): from each weight's gradient the row's average is subtracted, ds = p (dp - Σ dp p).

    The mask needs no line of its own: where p = 0, ds = 0.
    """
    return softmax_backward(weights, dweights.clone(), (dweights * weights).sum(-1))


def dq(dscores: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """S = q kᵀ / √D: dq = dS k / √D."""
    return dscores @ k / math.sqrt(q.shape[-1])


def dk(dscores: Tensor, q: Tensor) -> Tensor:
    """S = q kᵀ / √D: dk = dSᵀ q / √D."""
    return dscores.mT @ q / math.sqrt(q.shape[-1])


def _softmax_terms(dweights: Tensor, weights: Tensor) -> Terms:
    product = dweights * weights
    bare = {"missing sum: there is no sum": -weights * product}
    return {"p dp": (product, {}), "-p Σ dp p": (-weights * product.sum(-1, keepdim=True), bare)}


SOFTMAX_FAULTS = {
    "factor: there is a mean where there must be a sum": lambda dweights, weights: (
        weights * (dweights - (dweights * weights).mean(-1, keepdim=True))
    ),
    "factor: weights is missing in the sum, Σ dp p": lambda dweights, weights: (
        weights * (dweights - dweights.sum(-1, keepdim=True))
    ),
    "missing sum: it runs over the wrong axis": lambda dweights, weights: (
        weights * (dweights - (dweights * weights).sum(-2, keepdim=True))
    ),
}
ATTENTION = Exercise(
    name="attention",
    title="Attention",
    story="""One head, causal: scores of queries and keys, a softmax of each row that sees no future, a weighted
sum of values. Two of the three steps are products of matrices; the softmax is the new one.""",
    inputs=lambda generator: random(generator, q=(B, T, C), k=(B, T, C), v=(B, T, C)),
    steps={
        "scores": lambda q, k: q @ k.mT / math.sqrt(q.shape[-1]),  # (B, T, T)
        "weights": _masked,
        "y": lambda weights, v: weights @ v,  # (B, T, C)
    },
    blanks=(
        Blank(solution=dv, hints=("As dW2 of exercise 1, for each of the batch: .mT exchanges the last two axes.",)),
        Blank(solution=dweights, hints=("(B, T, T) out of (B, T, C) twice: one product fits.",)),
        Blank(
            solution=dscores,
            hints=("∂p_i/∂s_j = p_i (δ_ij - p_j)", "p * (dp - (dp * p).sum(-1, keepdim=True))"),
            terms=_softmax_terms,
            faults=SOFTMAX_FAULTS,
            rule=softmax_backward,
        ),
        Blank(solution=dq, hints=("A product, and the factor of the forward pass.",)),
        Blank(solution=dk, hints=("A product, one of the two transposed, and the factor of the forward pass.",)),
    ),
)


def _block_inputs(generator: torch.Generator) -> Values:
    shapes = {"x": (B, T, C), "Wq": (C, C), "Wk": (C, C), "Wv": (C, C), "Wo": (C, C), "W1": (C, 8), "b1": (8,)}
    values = random(generator, **shapes, W2=(8, C), b2=(C,))
    ones = torch.ones(C, dtype=torch.float64)
    return values | {"one": ones, "zero": torch.zeros_like(ones)}


def _blanks() -> tuple[Blank, ...]:
    def dact(dx2: Tensor, W2: Tensor) -> Tensor:
        """A linear layer's input: dy Wᵀ, for W of (in, out)."""
        return dx2 @ W2.mT

    def dW2(dx2: Tensor, act: Tensor) -> Tensor:
        """A linear layer's weight meets every row of batch and time: xᵀ dy of all B T rows."""
        return act.flatten(0, 1).mT @ dx2.flatten(0, 1)

    def dhidden(dact: Tensor, hidden: Tensor) -> Tensor:
        """max(0, x) has slope 1 where x is positive, else 0."""
        return dact * (hidden > 0)

    def db1(dhidden: Tensor) -> Tensor:
        """It was broadcast over batch and time."""
        return dhidden.sum((0, 1))

    def dx1(dx2: Tensor, dn2: Tensor, x1: Tensor, one: Tensor) -> Tensor:
        """x1 is read twice, by the sum and by the norm: the stream's gradient, plus what comes back by the branch."""
        return dx2 + through_norm(nn.LayerNorm, x1, dn2, one)["x"]

    def dmixed(dx1: Tensor, Wo: Tensor) -> Tensor:
        """A linear layer's input."""
        return dx1 @ Wo.mT

    def dn1(dq: Tensor, dk: Tensor, dv: Tensor, Wq: Tensor, Wk: Tensor, Wv: Tensor) -> Tensor:
        """It is read three times, as queries, keys and values: three gradients add up."""
        return dq @ Wq.mT + dk @ Wk.mT + dv @ Wv.mT

    def dWk(dk: Tensor, n1: Tensor) -> Tensor:
        """As dW2."""
        return n1.flatten(0, 1).mT @ dk.flatten(0, 1)

    def dx(dx1: Tensor, dn1: Tensor, x: Tensor, one: Tensor) -> Tensor:
        """As dx1: the stream, and the branch through the norm."""
        return dx1 + through_norm(nn.LayerNorm, x, dn1, one)["x"]

    return (
        Blank(solution=dact, hints=("(B, T, 8) out of (B, T, C) and (8, C).",)),
        Blank(solution=dW2, hints=("(8, C): batch and time are summed.", "flatten(0, 1) makes rows of both")),
        Blank(solution=dhidden, hints=("Where is ReLU's slope 1?",)),
        Blank(solution=db1, hints=("It was broadcast over two axes.",)),
        Blank(solution=dx1, hints=("Two steps read x1.", "dx2, plus dn2 through LayerNorm"), rule=norms.layer_norm),
        Blank(solution=dmixed, hints=("(B, T, C) out of (B, T, C) and (C, C).",)),
        Blank(
            solution=dscores,
            hints=("As in the exercise attention.",),
            terms=_softmax_terms,
            faults=SOFTMAX_FAULTS,
            rule=softmax_backward,
        ),
        Blank(solution=dn1, hints=("Three steps read n1.", "A product each: add all three")),
        Blank(solution=dWk, hints=("As dW2.",)),
        Blank(solution=dx, hints=("Two steps read x.", "As dx1"), rule=norms.layer_norm),
    )


BLOCK = Exercise(
    name="block",
    title="A block of GPT",
    story="""LayerNorm, attention, a sum; LayerNorm, a linear layer out, ReLU, one back, a sum. The residual
stream is read twice at each sum. Weights are (in, out). The parts of attention and of LayerNorm are exercises of
their own: copy them. LayerNorm's gain `one` is 1 and its bias 0, ε is 1e-5.""",
    inputs=_block_inputs,
    steps={
        "n1": lambda x, one, zero: layer_norm(x, one, zero),  # (B, T, C)
        "q": lambda n1, Wq: n1 @ Wq,
        "k": lambda n1, Wk: n1 @ Wk,
        "v": lambda n1, Wv: n1 @ Wv,
        "scores": lambda q, k: q @ k.mT / math.sqrt(q.shape[-1]),  # (B, T, T)
        "weights": _masked,
        "mixed": lambda weights, v: weights @ v,  # (B, T, C)
        "x1": lambda x, mixed, Wo: x + mixed @ Wo,
        "n2": lambda x1, one, zero: layer_norm(x1, one, zero),
        "hidden": lambda n2, W1, b1: n2 @ W1 + b1,  # (B, T, 8)
        "act": lambda hidden: torch.relu(hidden),
        "x2": lambda x1, act, W2, b2: x1 + act @ W2 + b2,  # (B, T, C)
    },
    blanks=_blanks(),
)
