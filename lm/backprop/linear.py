"""Rules of layers that are linear in their input, and of containers.

Shapes: N rows (all leading dimensions together), I and O channels in and out, V vocabulary, C channels, B batch,
T time, K taps of a convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.backprop.rules import Backward, Gradients, for_products, once, rule, run
from lm.models.dropout import Dropout
from lm.models.layers import FlattenConsecutive
from lm.models.parts import precise, rows_of


@rule(nn.Linear)
def linear(layer: nn.Linear, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = x Wᵀ + b, that is y_no = Σ_i x_ni W_oi + b_o.

    W_oi meets every row n, so dW_oi = Σ_n dy_no x_ni: dW = dyᵀ x. b is broadcast over the rows, so its gradient is the
    sum over them: db = Σ_n dy_n. x_ni meets every output o: dx = dy W.
    """
    x = for_products(x)
    y = F.linear(x, layer.weight, layer.bias)  # (…, I) -> (…, O)
    return y, lambda dy: linear_backward(layer, grads, x, dy)


def linear_backward(layer: nn.Linear, grads: Gradients, x: Tensor, dy: Tensor) -> Tensor:
    """Add dW and db of a linear layer, and return dx."""
    dy = for_products(dy)
    linear_gradients(layer, grads, x, dy)
    return dy @ layer.weight  # (…, O) @ (O, I) -> (…, I)


def linear_gradients(layer: nn.Linear, grads: Gradients, x: Tensor, dy: Tensor) -> None:
    """Add dW and db of a linear layer, for rules that make x again rather than keep it; both of the products' type."""
    rows = rows_of(dy)  # (…, O) -> (N, O)
    if layer.bias is not None:
        grads.add(layer.bias, precise(rows).sum(0))  # (N, O) -> (O,)
    grads.add(layer.weight, rows.mT @ rows_of(x).to(rows.dtype))  # (O, N) @ (N, I) -> (O, I)


@rule(nn.Embedding)
def embedding(layer: nn.Embedding, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """y_n = W[token_n].

    A row of W is read once for each occurrence of its token, so it collects the sum of their gradients:
    dW[v] = Σ_{n: token_n = v} dy_n. Tokens are no numbers to differentiate by. Where the table is also the output head,
    this adds to what the head has left there.
    """
    y = layer.weight[tokens]  # (…) -> (…, C)

    def backward(dy: Tensor) -> None:
        grads.add_rows(layer.weight, tokens.flatten(), rows_of(dy))

    return y, backward


def positions(layer: nn.Embedding, grads: Gradients, T: int) -> tuple[Tensor, Backward]:  # noqa: N803
    """The first T rows of a table of positions, which a sum broadcasts over the batch.

    What the sum broadcasts, its gradient sums: dW[t] = Σ_b dy_bt. Later rows have none.
    """

    def backward(dy: Tensor) -> None:
        summed = precise(dy).sum(0)  # (B, T, C) -> (T, C)
        grads.add(layer.weight, F.pad(summed, (0, 0, 0, layer.num_embeddings - T)))  # -> (block_size, C)

    return layer.weight[:T], backward


def convolution(x: Tensor, kernel: Tensor, dilation: int, bias: Tensor | None = None) -> tuple[Tensor, Backward]:
    """A dilated convolution: y_bot = Σ_k Σ_i W_oik x_bi(t + k·dilation), of time T - (K - 1)·dilation.

    Tap k is a linear map of x shifted by s = k·dilation. So dW_k = Σ_bt dy_t x_(t+s)ᵀ, and x_(t+s) gets W_kᵀ dy_t from
    each tap, which add up where the shifted windows overlap.

    Args:
        x: (B, I, T).
        kernel: (O, I, K).
        dilation: Distance of neighbouring taps.
        bias: (O,), added to y; its gradient is left to who gives it.

    Returns:
        y (B, O, T'), and a function from dy to (dx, dkernel).
    """
    y = F.conv1d(x, kernel, bias, dilation=dilation)
    T = y.shape[2]  # noqa: N806

    def backward(dy: Tensor) -> tuple[Tensor, Tensor]:
        dx, taps = torch.zeros_like(x), []
        for k, tap in enumerate(kernel.unbind(2)):  # (O, I)
            window = slice(k * dilation, k * dilation + T)
            taps.append((dy @ x[:, :, window].mT).sum(0))  # (B, O, T') @ (B, T', I) -> (B, O, I) -> (O, I)
            dx[:, :, window] += tap.mT @ dy  # (I, O) @ (B, O, T') -> (B, I, T')
        return dx, torch.stack(taps, dim=2)  # K of (O, I) -> (O, I, K)

    return y, backward


@rule(nn.Conv1d)
def conv1d(layer: nn.Conv1d, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """A `convolution` plus a bias that is broadcast over batch and time: db = Σ_bt dy_bt."""
    y, backward_product = convolution(x, layer.weight, layer.dilation[0], layer.bias)

    def backward(dy: Tensor) -> Tensor:
        assert layer.bias is not None
        grads.add(layer.bias, precise(dy).sum((0, 2)))  # (B, O, T) -> (O,)
        dx, dkernel = backward_product(dy)
        grads.add(layer.weight, dkernel)
        return dx

    return y, backward


@rule(FlattenConsecutive)
def flatten_consecutive(layer: FlattenConsecutive, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """Numbers keep their value and change their place: the gradient goes back to where they were."""
    return layer(x), lambda dy: dy.reshape(x.shape)


@rule(Dropout)
def dropout(layer: Dropout, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = x ∘ m, where m is 0 with probability p and else 1 / (1 - p): dx = dy ∘ m."""
    mask = layer.mask(x)
    return (x, lambda dy: dy) if mask is None else (x * mask, lambda dy: dy * mask)


@rule(nn.Dropout)
def torch_dropout(layer: nn.Dropout, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """The same by torch's mask."""
    return drop(x, layer.p if layer.training else 0.0)


def drop(x: Tensor, p: float) -> tuple[Tensor, Backward]:
    """Return x with elements dropped, by the random numbers that F.dropout would use, and the backward pass."""
    if p == 0:
        return x, lambda dy: dy
    y, kept = torch.native_dropout(x, p, True)
    return y, lambda dy: dy * kept * (1 / (1 - p))


@rule(nn.Identity)
def identity(layer: nn.Identity, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = x: dx = dy."""
    return x, lambda dy: dy


@rule(nn.Sequential)
def sequential(layer: nn.Sequential, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """One after the other; the gradient goes through them from the last to the first."""
    backwards = []
    for part in layer:
        x, backward = run(part, grads, x)
        backwards.append(backward)
    return x, chained(backwards)


def chained(backwards: list[Backward]) -> Backward:
    """Return the backward pass of layers one after the other; each is let go, with what it kept, as soon as it ran."""

    @once
    def backward(dy: Any) -> Any:
        while backwards:
            dy = backwards.pop()(dy)
        return dy

    return backward
