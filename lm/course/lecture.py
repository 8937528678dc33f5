"""The four exercises of Karpathy's makemore part 4: the 26 tensors, two shortcuts, and a training without autograd."""
# ruff: noqa: N803  names of the lecture

import torch
from torch import Tensor
from torch.nn import functional as F

from lm.backprop import atomic, loss, norms
from lm.backprop.rules import Gradients, run
from lm.course.exercise import Blank, Exercise, Terms, Values, norm_terms, total
from lm.models.layers import BatchNorm

V, T, C, H, N = 27, 3, 10, 64, 32
PARAMETERS = ("C", "W1", "b1", "W2", "b2", "bngain", "bnbias")
RATE = 0.1


def _parameters(generator: torch.Generator) -> Values:
    """Small random biases and gains, rather than zeros and ones, behind which errors hide."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "C": random(V, C),
        "W1": random(T * C, H) * (5 / 3) / (T * C) ** 0.5,
        "b1": random(H) * 0.1,
        "W2": random(H, V) * 0.1,
        "b2": random(V) * 0.1,
        "bngain": 1 + random(1, H) * 0.1,
        "bnbias": random(1, H) * 0.1,
    }


def _batch(generator: torch.Generator, *shape: int) -> Values:
    return {
        "tokens": torch.randint(V, (*shape, N, T), generator=generator),
        "targets": torch.randint(V, (*shape, N), generator=generator),
    }


def _mlp_inputs(generator: torch.Generator) -> Values:
    return {**_parameters(generator), **_batch(generator), "n": N, "m": N - 1, "eps": 1e-5}


HINTS = {
    "logprobs": ("The loss is -(a + b + c + …)/n of one entry a row.", "zeros, and -1/n at [arange(n), targets]"),
    "probs": ("The slope of log x is 1/x.",),
    "counts_sum_inv": ("A column of (n, 1) was broadcast over 27.", "A product, summed over axis 1 with keepdim"),
    "counts_sum": ("The slope of 1/x is -1/x².",),
    "counts": ("Two steps read counts.", "dprobs * counts_sum_inv, and dcounts_sum for each that was summed: add"),
    "norm_logits": ("exp is its own slope, and counts has it already.",),
    "logit_maxes": ("It is subtracted from all 27 of a row.", "Minus a sum over axis 1, keepdim"),
    "logits": ("Two steps read logits.", "max also gives indices: one_hot(indices, 27), or scatter_add"),
    "h": ("(32, 64) out of (32, 27) and (64, 27): one product fits.",),
    "W2": ("(64, 27) out of (32, 64) and (32, 27): one product fits.",),
    "b2": ("It was broadcast over 32 rows.",),
    "hpreact": ("The slope of tanh is 1 - tanh².", "h is the tanh already"),
    "bngain": ("It was broadcast over 32 rows.", "The shape is (1, 64): keepdim=True"),
    "bnbias": ("It was broadcast over 32 rows.", "The shape is (1, 64): keepdim=True"),
    "bnraw": ("A factor's gradient is the other factor.",),
    "bnvar_inv": ("It was broadcast over 32 rows.", "A product, summed over axis 0 with keepdim"),
    "bnvar": ("The slope of x^-½ is -½ x^-³⁄₂.", "bnvar_inv is x^-½ already: its third power"),
    "bndiff2": ("A sum hands its gradient to each term.", "divided by m as the sum was; the shape is (32, 64)"),
    "bndiff": ("Two steps read bndiff.", "dbnraw * bnvar_inv, and 2 bndiff dbndiff2: add"),
    "bnmeani": ("It is subtracted from all 32 rows.", "Minus a sum over axis 0, keepdim"),
    "hprebn": ("Two steps read hprebn.", "dbndiff as it is, and a share of 1/n of dbnmeani: add"),
    "embcat": ("As dh.",),
    "W1": ("As dW2.",),
    "b1": ("As db2.",),
    "emb": ("A view: the numbers stay, the shape goes back.",),
    "C": ("A row of C is read wherever its token stands.", "zeros, and add at tokens: index_add_, or two loops and +="),
}
MLP_STEPS = atomic.FORWARD
MLP = Exercise(
    name="mlp",
    title="Exercise 1: backpropagation through 26 tensors",
    story="""The MLP with BatchNorm of the lecture, broken into atoms: 27 symbols, context 3, a batch of n = 32;
m = n - 1 is Bessel's correction. Go from the loss backwards, and derive each gradient before you look anything up.

Each function is given forward values by their names, and gradients that you have found by a d in front. Other
values may be asked for by adding parameters: every tensor of the forward pass is there.""",
    inputs=_mlp_inputs,
    steps=MLP_STEPS,
    blanks=tuple(Blank(solution=one, hints=HINTS[name]) for name, one in atomic.GRADIENTS.items()),
)


def dlogits(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p_y = log Σ_j e^{z_j} - z_y. By z_j, the first term has e^{z_j} / Σ e^z = p_j, the second 1 at y alone.

    So dz = (p - onehot(y)) / n for the mean over n rows.
    """
    return loss.cross_entropy(logits, targets)[1]


CROSS_ENTROPY = Exercise(
    name="cross-entropy",
    title="Exercise 2: cross-entropy in one line",
    story="""Eight of the 26 tensors were between the logits and the loss. Take pen and paper, write down the
loss of one row, -log(e^{z_y} / Σ_j e^{z_j}), and find its derivative by z_i, first for i = y, then for i ≠ y. Much
cancels.

Then look at a row: it is the probabilities, minus 1 at the label, and it sums to zero. Wrong symbols are pushed
down by how probable they are, the right one is pulled up.""",
    inputs=lambda generator: {
        "logits": torch.randn(N, V, generator=generator, dtype=torch.float64),
        "targets": torch.randint(V, (N,), generator=generator),
    },
    steps={"loss": lambda logits, targets: F.cross_entropy(logits, targets)},
    blanks=(
        Blank(
            solution=dlogits,
            hints=(
                "log Σ_j e^{z_j} - z_y: differentiate each of the two terms by z_i.",
                "i ≠ y: p_i. i = y: p_i - 1.",
                "The loss is a mean over n rows.",
            ),
            terms=lambda logits, targets: {
                "softmax(logits)": (logits.softmax(1) / len(logits), {}),
                "-onehot(targets)": (-F.one_hot(targets, V) / len(logits), {}),
            },
            faults={
                "factor: softmax runs over the wrong axis": lambda logits, targets: (
                    (logits.softmax(0) - F.one_hot(targets, V)) / len(logits)
                ),
            },
            rule=loss.cross_entropy,
        ),
    ),
)


def _normalised(hprebn: Tensor, bngain: Tensor, bnbias: Tensor) -> Tensor:
    mean, var = hprebn.mean(0, keepdim=True), hprebn.var(0, keepdim=True, correction=1)  # (1, H)
    return bngain * (hprebn - mean) * (var + 1e-5) ** -0.5 + bnbias


def _terms(dhpreact: Tensor, hprebn: Tensor, bngain: Tensor, correction: int = 1) -> Terms:
    """The three ways from x to the loss, as they are, or for a wrong variance."""
    n = len(hprebn)
    r = (hprebn.var(0, keepdim=True, correction=correction) + 1e-5) ** -0.5
    hat, g = (hprebn - hprebn.mean(0)) * r, bngain * dhpreact
    return norm_terms(r, hat, g, 0, n - correction, centred=True)


def _three_ways(dhpreact: Tensor, hprebn: Tensor, bngain: Tensor) -> Terms:
    return _terms(dhpreact, hprebn, bngain)


def _biased(dhpreact: Tensor, hprebn: Tensor, bngain: Tensor) -> Tensor:
    return total(_terms(dhpreact, hprebn, bngain, correction=0))


def _without_gain(dhpreact: Tensor, hprebn: Tensor) -> Tensor:
    ones = torch.ones(1, H, dtype=torch.float64)
    return total(_terms(dhpreact, hprebn, ones))


def dhprebn(dhpreact: Tensor, hprebn: Tensor, bngain: Tensor) -> Tensor:
    """dx = r (g - Σg / n - x̂ Σ(g x̂) / m), with g = γ dy: three ways from x to the loss."""
    layer = BatchNorm(hprebn.shape[1], bessel=True).double()
    layer.weight.data = bngain.flatten()
    _, backward = run(layer, Gradients(), hprebn)
    found: Tensor = backward(dhpreact)
    return found


BATCH_NORM = Exercise(
    name="batch-norm",
    title="Exercise 3: BatchNorm in one line",
    story="""Nine of the tensors were inside BatchNorm. Take one neuron: x has n values, x̂ = (x - μ) / √(σ² +
ε), y = γ x̂ + β, and σ² is Σ(x - μ)² / (n - 1). Given dy, find dx on paper: draw the graph, go from x̂ to σ², to
μ, to x, and simplify. What the mean gets through the variance is zero, because Σ(x - μ) is.

Then write it for 64 neurons at once.""",
    inputs=lambda generator: {
        "hprebn": 0.3 + 2 * torch.randn(N, H, generator=generator, dtype=torch.float64),
        **{name: one for name, one in _parameters(generator).items() if name in ("bngain", "bnbias")},
        "n": N,
    },
    steps={"hpreact": _normalised},
    blanks=(
        Blank(
            solution=dhprebn,
            hints=(
                "x reaches the loss in three ways: directly, through σ², and through μ.",
                "dσ² = -½ r³ Σ g (x - μ) with g = γ dy and r = (σ² + ε)^-½; and dσ²/dx = 2 (x - μ) / (n - 1).",
                "dx = r (g - Σg / n - x̂ Σ(g x̂) / (n - 1))",
            ),
            terms=_three_ways,
            faults={
                "Bessel: the variance is divided by n where it must be n - 1": _biased,
                "factor: the gain is missing: g = γ dy": _without_gain,
            },
            rule=norms.batch_norm,
        ),
    ),
)


def gradients(
    C: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, bngain: Tensor, bnbias: Tensor, tokens: Tensor,
    targets: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Forward, then backward from the loss to C; the gradients in the order of the parameters."""
    v: Values = {"C": C, "W1": W1, "b1": b1, "W2": W2, "b2": b2, "bngain": bngain, "bnbias": bnbias}
    v |= {"tokens": tokens, "targets": targets, "n": len(tokens), "m": len(tokens) - 1, "eps": 1e-5}
    for name, step in MLP_STEPS.items():
        v[name] = atomic.called(step, v)
    found = atomic.backward(v)
    return tuple(found[name] for name in PARAMETERS)


def _single(values: Values, index: int) -> tuple[Exercise, Blank, Values]:
    """Return exercise 1's blank for one of the seven gradients, with the right gradients from above."""
    v = values | {"n": N, "m": N - 1, "eps": 1e-5, "dloss": torch.ones((), dtype=torch.float64)}
    for name, step in MLP_STEPS.items():
        v[name] = atomic.called(step, v)
    v |= {f"d{name}": gradient for name, gradient in atomic.backward(v).items()}
    return MLP, MLP.by_name[f"d{PARAMETERS[index]}"], v


def train(parameters: tuple[Tensor, ...], batches: list[tuple[Tensor, Tensor]], lr: float) -> tuple[Tensor, ...]:
    """Gradient descent: against the gradient, a little, again and again."""
    for tokens, targets in batches:
        found = gradients(*(*parameters, tokens, targets))
        parameters = tuple(p - lr * g for p, g in zip(parameters, found, strict=True))
    return parameters


def _by_autograd(parameters: tuple[Tensor, ...], tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    v: Values = dict(zip(PARAMETERS, leaves, strict=True)) | {"n": N, "m": N - 1, "eps": 1e-5}
    v |= {"tokens": tokens, "targets": targets}
    with torch.enable_grad():
        for name, step in MLP_STEPS.items():
            v[name] = atomic.called(step, v)
        return torch.autograd.grad(v["loss"], leaves)


def _trained(parameters: tuple[Tensor, ...], batches: list[tuple[Tensor, Tensor]], lr: float) -> tuple[Tensor, ...]:
    for tokens, targets in batches:
        found = _by_autograd(parameters, tokens, targets)
        parameters = tuple(p - lr * g for p, g in zip(parameters, found, strict=True))
    return parameters


def _training_inputs(generator: torch.Generator) -> Values:
    values: Values = {**_parameters(generator), **_batch(generator), "lr": RATE}
    values["parameters"] = tuple(values[name] for name in PARAMETERS)
    more = _batch(generator, 20)
    values["batches"] = list(zip(more["tokens"], more["targets"], strict=True))
    return values


TRAINING = Exercise(
    name="training",
    title="Exercise 4: train without autograd",
    story="""Put together what you have: a function that goes forward and backward through the MLP, and returns
the gradients of its seven parameters in their order, (C, W1, b1, W2, b2, bngain, bnbias); and a training that
takes a step against the gradient for each batch. BatchNorm has Bessel's correction and ε = 1e-5. Copy your lines
from the exercises before, and take the one-line versions of 2 and 3. The result of 20 steps must be autograd's.""",
    inputs=_training_inputs,
    steps={},
    blanks=(
        Blank(
            solution=gradients,
            hints=("Forward as in exercise 1, then your lines from there in their order.", "Seven tensors in a tuple"),
            expected=lambda parameters, tokens, targets: _by_autograd(parameters, tokens, targets),
            single=_single,
        ),
        Blank(
            solution=train,
            hints=("for tokens, targets in batches: …", "p - lr * g for each parameter; return all seven"),
            expected=_trained,
        ),
    ),
)
LECTURE = (MLP, CROSS_ENTROPY, BATCH_NORM, TRAINING)
