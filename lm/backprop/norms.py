"""Rules of normalisations.

Shapes: N rows (all leading dimensions together), C channels, … any leading dimensions.
"""

import torch
from torch import Tensor, nn

from lm.backprop.rules import Backward, Gradients, precise, rows_of, rule
from lm.models.layers import BatchNorm


@rule(BatchNorm)
def batch_norm(layer: BatchNorm, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = γ x̂ + β, where x̂ = (x - μ) r normalises each channel over its n examples, r = (v + ε)^-½.

    γ and β are broadcast over the examples, so dγ = Σ dy x̂ and dβ = Σ dy. With g = γ dy, the gradient by x̂:
    v = Σ (x - μ)² / m, where m is n, or n - 1 with Bessel's correction. As dr/dv = -½ r³,
        dv = Σ g (x - μ) (-½ r³) = -½ r² Σ g x̂,
    and v reaches x by dv/dx = 2 (x - μ) / m: a share r² Σ(g x̂) (x - μ) / m = r x̂ Σ(g x̂) / m.
    μ, a mean over n, gives each example the mean of -r g; by v it gets nothing, as Σ (x - μ) = 0. Together
        dx = r (g - Σg / n - x̂ Σ(g x̂) / m).
    In eval mode μ and v are constants, and dx = r g.
    """

    def examples(x: Tensor) -> Tensor:
        return x if layer.n_positions is not None else rows_of(x)  # (B, T, C) as it is, or (N, C)

    n = examples(x).shape[0]
    if layer.training:
        if n < 2:
            layer(x)  # says what is wrong
        var, mean = torch.var_mean(precise(examples(x)), dim=0, correction=int(layer.bessel))  # (C) or (T, C)
        layer._remember(n, mean, var)
    else:
        var, mean = layer.running_var, layer.running_mean
    r = (var + layer.eps).rsqrt()
    normal = (x - mean) * r  # x̂, of x's shape

    def backward(dy: Tensor) -> Tensor:
        sum_x, sum_1 = examples(dy * normal).sum(0), examples(precise(dy)).sum(0)  # Σ dy x̂ and Σ dy, (C) or (T, C)
        for parameter, total in ((layer.weight, sum_x), (layer.bias, sum_1)):
            grads.add(parameter, total if total.ndim == 1 else total.sum(0))  # -> (C)
        scale = layer.weight * r
        if not layer.training:
            return dy * scale
        m = n - int(layer.bessel)
        return (dy - sum_1 / n - normal * (sum_x / m)) * scale

    return normal * layer.weight + layer.bias, backward


@rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = γ x̂ + β, where x̂ = (x - μ) r normalises each row over its C channels, r = (v + ε)^-½, v = Σ (x - μ)² / C.

    γ and β are broadcast over the rows: dγ = Σ_n dy x̂, dβ = Σ_n dy. μ and v are a row's own, so with g = γ dy it is
    BatchNorm's derivation with sums over channels in place of examples:
        dx = r (g - mean(g) - x̂ mean(g x̂)).
    A row's mean of γ dy is the product dy · γ / C: a matrix times a vector.
    """
    C = x.shape[-1]  # noqa: N806
    normal, _, r = torch.native_layer_norm(precise(x), (C,), None, None, layer.eps)  # x̂ (…, C), r (…, 1)
    y = normal * layer.weight if layer.bias is None else torch.addcmul(layer.bias, normal, layer.weight)

    def backward(dy: Tensor) -> Tensor:
        dy = precise(dy)
        product = dy * normal  # (…, C)
        grads.add(layer.weight, rows_of(product).sum(0))  # (N, C) -> (C,)
        if layer.bias is not None:
            grads.add(layer.bias, rows_of(dy).sum(0))
        gamma = layer.weight / C
        mean_g = _rowwise(dy, gamma)  # (…, 1)
        mean_gx = _rowwise(product, gamma)
        dx = torch.addcmul(mean_g.neg(), dy, layer.weight)  # g - mean(g)
        return dx.addcmul_(normal, mean_gx, value=-1).mul_(r)

    return y, backward


@rule(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = γ x̂, where x̂ = x r and r = (Σ x² / C + ε)^-½ of each row.

    As LayerNorm without μ: r reaches x by dr/dx = -r³ x / C, which turns Σ g x into -r x̂ Σ(g x̂) / C:
        dx = r (g - x̂ mean(g x̂)), g = γ dy; dγ = Σ_n dy x̂.
    """
    C = x.shape[-1]  # noqa: N806
    x = precise(x)
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()  # (…, 1)
    normal = x * r

    def backward(dy: Tensor) -> Tensor:
        dy = precise(dy)
        product = dy * normal
        grads.add(layer.weight, rows_of(product).sum(0))
        mean_gx = _rowwise(product, layer.weight / C)  # (…, 1)
        return (dy * layer.weight).addcmul_(normal, mean_gx, value=-1).mul_(r)

    return normal * layer.weight, backward


def _rowwise(x: Tensor, weight: Tensor) -> Tensor:
    """Return each row's product with weight (C,), (…, 1). Under autocast, too, in full precision."""
    with torch.autocast(x.device.type, enabled=False):
        return (x @ weight).unsqueeze(-1)
