"""Exercises beyond the lecture's: what a GPT and a WaveNet are made of."""
# ruff: noqa: N802, N803  names of matrices

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.backprop import linear, norms
from lm.backprop.attention import rotary
from lm.backprop.rules import Gradients, run
from lm.course.exercise import Blank, Exercise, Step, Terms, Values, norm_terms, total
from lm.models.rotary import Rotary

B, T, C, V = 4, 5, 6, 11
EPS = 1e-5


def random(generator: torch.Generator, **shapes: tuple[int, ...]) -> Values:
    """Return normal random numbers by name."""
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _by_rule(layer: nn.Module, x: Tensor, dy: Tensor, **weights: Tensor) -> dict[str, Tensor]:
    """Return the gradients by a layer's input, x, and by its weights, by the product's own rule."""
    for name, weight in weights.items():
        setattr(layer, name, nn.Parameter(weight))
    _, backward = run(layer, Gradients(), x)
    found = {"x": backward(dy)}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}


# -- LayerNorm and RMSNorm

Norm = type[nn.LayerNorm] | type[nn.RMSNorm]


def through_norm(kind: Norm, x: Tensor, dy: Tensor, gamma: Tensor) -> dict[str, Tensor]:
    """Return a norm's gradients: x, weight, and of LayerNorm bias."""
    return _by_rule(kind(C, eps=EPS).double(), x, dy, weight=gamma)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """LayerNorm."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)  # (B, T, 1)
    return gamma * (x - mean) * (var + EPS) ** -0.5 + beta


def _terms(dy: Tensor, x: Tensor, gamma: Tensor, *, centred: bool, correction: int = 0) -> Terms:
    """The ways from x to the loss through a norm of each row; without the mean, RMSNorm's two."""
    mean = x.mean(-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
    r = ((x - mean).square().sum(-1, keepdim=True) / (C - correction) + EPS) ** -0.5  # (B, T, 1)
    hat, g = (x - mean) * r, gamma * dy
    return norm_terms(r, hat, g, -1, C, centred=centred)


def _of_gain_and_input(kind: Norm, rule: Step, hints: tuple[str, ...]) -> tuple[Blank, Blank]:
    """Return the blanks that both norms have; the hints are those for dx."""
    centred = kind is nn.LayerNorm

    def dgamma(dy: Tensor, x: Tensor) -> Tensor:
        """It was broadcast over all rows: the sum of dy x̂ over batch and time."""
        return through_norm(kind, x, dy, torch.ones(C, dtype=torch.float64))["weight"]

    def dx(dy: Tensor, x: Tensor, gamma: Tensor) -> Tensor:
        """dx = r (g - mean(g) - x̂ mean(g x̂)), with g = γ dy: BatchNorm's, with channels in place of examples.

        RMSNorm subtracts no mean, so mean(g) is not there.
        """
        return through_norm(kind, x, dy, gamma)["x"]

    def without_gain(dy: Tensor, x: Tensor) -> Tensor:
        return total(_terms(dy, x, torch.ones_like(x), centred=centred))

    def corrected(dy: Tensor, x: Tensor, gamma: Tensor) -> Tensor:
        return total(_terms(dy, x, gamma, centred=centred, correction=1))

    faults: dict[str, Step] = {
        "Bessel: the squares are divided by C - 1 where they must be by C": corrected,
        "factor: the gain is missing: g = γ dy": without_gain,
    }
    return (
        Blank(
            solution=dgamma,
            hints=("γ met every row of the batch.", "Σ dy x̂ over the axes 0 and 1"),
            faults={
                "factor: x̂ is missing: γ was multiplied by it": lambda dy: dy.sum((0, 1)),
                "factor: x stands where x̂, after the norm, must": lambda dy, x: (dy * x).sum((0, 1)),
            },
            rule=rule,
        ),
        Blank(
            solution=dx,
            hints=hints,
            terms=lambda dy, x, gamma: _terms(dy, x, gamma, centred=centred),
            faults=faults,
            rule=rule,
        ),
    )


def dbeta(dy: Tensor, x: Tensor) -> Tensor:
    """It was broadcast over all rows: the sum of dy over batch and time."""
    return through_norm(nn.LayerNorm, x, dy, torch.ones(C, dtype=torch.float64))["bias"]


LAYER_NORM = Exercise(
    name="layer-norm",
    title="LayerNorm",
    story="""Each row of C channels gets mean 0 and variance 1 of its own; the variance divides by C, without
Bessel's correction, and ε is 1e-5. It is exercise 3 with the other axis.""",
    inputs=lambda generator: random(generator, x=(B, T, C), gamma=(C,), beta=(C,)),
    steps={"y": layer_norm},
    blanks=(
        *_of_gain_and_input(
            nn.LayerNorm,
            norms.layer_norm,
            ("Three ways: directly, by the mean, by the variance.", "r (g - mean(g) - x̂ mean(g x̂)), g = γ dy"),
        ),
        Blank(
            solution=dbeta,
            hints=("β met every row of the batch.", "Σ dy over the axes 0 and 1"),
            rule=norms.layer_norm,
        ),
    ),
)
RMS_NORM = Exercise(
    name="rms-norm",
    title="RMSNorm",
    story="LayerNorm without the mean: y = γ x r with r = (mean(x²) + ε)^-½, ε = 1e-5. LLaMA has it.",
    inputs=lambda generator: random(generator, x=(B, T, C), gamma=(C,)),
    steps={"y": lambda x, gamma: gamma * x * (x.square().mean(-1, keepdim=True) + EPS) ** -0.5},
    blanks=_of_gain_and_input(
        nn.RMSNorm,
        norms.rms_norm,
        ("Two ways: directly, and through r.", "dr/dx = -r³ x / C", "r (g - x̂ mean(g x̂)), g = γ dy"),
    ),
)


# -- embedding and convolution


def _embedding_exercise() -> Exercise:
    def dx(dlogits: Tensor, W: Tensor) -> Tensor:
        """A linear layer without bias, y = x Wᵀ: dx = dy W."""
        return dlogits @ W  # (B, T, V) @ (V, C) -> (B, T, C)

    def dW(demb: Tensor, dlogits: Tensor, W: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        """W is used twice: rows are looked up by tokens, and all of it makes the logits. The two gradients add up.

        A row collects Σ demb wherever its token stands; the product adds dlogitsᵀ x, summed over batch and time.
        """
        layer, head, grads = nn.Embedding(V, C), nn.Linear(C, V, bias=False), Gradients()
        layer.weight = head.weight = nn.Parameter(W.clone())
        run(layer, grads, tokens)[1](demb)
        run(head, grads, x)[1](dlogits)
        assert head.weight.grad is not None
        return head.weight.grad

    return Exercise(
        name="embedding",
        title="An embedding that is also the output head",
        story="""GPT-2 ties its weights: one table W turns tokens into vectors, and vectors into logits. So a tensor
is used twice, and in one of the two uses a row may be read many times.""",
        inputs=lambda generator: {
            **random(generator, W=(V, C), x=(B, T, C)),
            "tokens": torch.randint(V, (B, T), generator=generator),
        },
        steps={"emb": lambda W, tokens: W[tokens], "logits": lambda x, W: x @ W.mT},
        blanks=(
            Blank(solution=dx, hints=("(B, T, C) out of (B, T, V) and (V, C): one product fits.",)),
            Blank(
                solution=dW,
                hints=(
                    "Two steps read W.",
                    "Rows: zeros, and index_add_ at tokens.flatten().",
                    "Product: dlogitsᵀ x of all B T rows: flatten(0, 1) both.",
                ),
                rule=linear.embedding,
            ),
        ),
    )


def _convolution_exercise() -> Exercise:
    def dbias(dy: Tensor) -> Tensor:
        """It was broadcast over batch and time: their sum."""
        return dy.sum((0, 2))

    def dkernel(dy: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """Tap k is a linear map of x shifted by 2 k: dW_k = Σ_bt dy_t x_(t + 2k)ᵀ."""
        found: Tensor = linear.convolution(x, kernel, 2)[1](dy)[1]
        return found

    def dx(dy: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """x_(t + 2k) gets W_kᵀ dy_t from each tap, and these add up where the shifted windows overlap."""
        found: Tensor = linear.convolution(x, kernel, 2)[1](dy)[0]
        return found

    return Exercise(
        name="convolution",
        title="A dilated convolution",
        story="""What WaveNet slides over its input: y_bot = Σ_k Σ_i W_oik x_bi(t + 2k) + bias_o, three taps, two
apart. A loop over the taps is short and right: each tap is a linear layer on a shifted window.""",
        inputs=lambda generator: random(generator, x=(B, 3, 9), kernel=(2, 3, 3), bias=(2,)),
        steps={"y": lambda x, kernel, bias: F.conv1d(x, kernel, bias, dilation=2)},
        blanks=(
            Blank(solution=dbias, hints=("It was broadcast over batch and time: which axes?",)),
            Blank(
                solution=dkernel,
                hints=(
                    "window = x[:, :, 2 * k : 2 * k + y's time] for tap k.",
                    "(dy @ window.mT).sum(0), stacked on axis 2",
                ),
                rule=linear.convolution,
            ),
            Blank(
                solution=dx,
                hints=("Each tap hands W_kᵀ dy to its window.", "zeros_like(x), and += into the windows: they overlap"),
                rule=linear.convolution,
            ),
        ),
    )


# -- rotary positions


def _rotary_exercise() -> Exercise:
    def dx(dy: Tensor, x: Tensor) -> Tensor:
        """A rotation's gradient is turned back by the same angle.

        For (y1, y2) = (x1 c - x2 s, x2 c + x1 s): dx1 = dy1 c + dy2 s and dx2 = dy2 c - dy1 s.
        """
        layer = Rotary(head_size=C, block_size=T).double()
        _, backward = run(layer, Gradients(), x)
        found: Tensor = backward(dy)
        return found

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs of channels i and i + D/2, turned by the angle of their position."""
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def inputs(generator: torch.Generator) -> Values:
        layer = Rotary(head_size=C, block_size=T).double()
        return {**random(generator, x=(B, T, C)), "cos": layer.cos, "sin": layer.sin}

    def onwards(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(dy, cos, sin)

    return Exercise(
        name="rotary",
        title="Rotary positions",
        story="""Each pair of channels, i and i + D/2, is turned by an angle that grows with the position; cos and
sin are (T, D), both halves alike. No length changes; what does a rotation's gradient do?""",
        inputs=inputs,
        steps={"y": turned},
        blanks=(
            Blank(
                solution=dx,
                hints=("Write y1 and y2 of one pair.", "x1 is in y1 with cos, and in y2 with sin.", "Turn back: -sin"),
                faults={
                    "factor: it is turned on instead of back: the sign of the sine": onwards,
                    "overwritten: each channel is in two: the part with the sine must be added": lambda dy, cos: (
                        dy * cos
                    ),
                    "overwritten: each channel is in two: the part with the cosine must be added": lambda dy, sin: (
                        onwards(dy, torch.zeros_like(sin), -sin)
                    ),
                },
                rule=rotary,
            ),
        ),
    )


EMBEDDING = _embedding_exercise()
ROTARY = _rotary_exercise()
CONVOLUTION = _convolution_exercise()


def dbetter(better: Tensor, worse: Tensor) -> Tensor:
    """-log σ(d) with d = better - worse: by d it is -(1 - σ(d)) = -σ(-d), divided by the n pairs of the mean."""
    return -torch.sigmoid(worse - better) / len(better)


def dworse(better: Tensor, worse: Tensor) -> Tensor:
    """d falls with it: the same with the other sign."""
    return torch.sigmoid(worse - better) / len(better)


RANKING = Exercise(
    name="ranking",
    title="The loss of a reward model",
    story="""Of two answers people have said which is better. The loss is -log σ(better - worse), a mean over pairs;
`better` and `worse` are the network's outputs for the two.""",
    inputs=lambda generator: random(generator, better=(8,), worse=(8,)),
    steps={"loss": lambda better, worse: -F.logsigmoid(better - worse).mean()},
    blanks=(
        Blank(solution=dbetter, hints=("σ' = σ (1 - σ), so log' σ = 1 - σ.", "-σ(worse - better), and the mean")),
        Blank(solution=dworse, hints=("It is subtracted where better is added.",)),
    ),
)
