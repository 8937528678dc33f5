"""Rules of normalisations.

Shapes: N rows (all leading dimensions together), C channels, … any leading dimensions.
"""

import torch
from torch import Tensor, nn

from lm.backprop.rules import Backward, Gradients, for_products, product_type, rule
from lm.models import parts
from lm.models.layers import BatchNorm
from lm.models.norms import RMSNorm, epsilon
from lm.models.parts import full_precision, in_parts, precise, rows_of


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
    x = precise(x)
    normal, _, r = torch.native_layer_norm(x, (C,), None, None, layer.eps)  # x̂ (…, C), r (…, 1)
    y = normal * layer.weight if layer.bias is None else torch.addcmul(layer.bias, normal, layer.weight)
    normal = for_products(normal)  # as it is kept

    def backward(dy: Tensor) -> Tensor:
        dx = torch.empty_like(normal, dtype=r.dtype)
        gamma, totals = layer.weight / C, dx.new_zeros(2, C)

        def part(dy: Tensor, normal: Tensor, r: Tensor, dx: Tensor) -> None:
            dy, normal = precise(dy), precise(normal)
            product = dy * normal  # (n, C)
            totals[0] += product.sum(0)
            if layer.bias is not None:
                totals[1] += dy.sum(0)
            torch.addcmul((dy @ gamma).neg_().unsqueeze(-1), dy, layer.weight, out=dx)  # g - mean(g)
            dx.addcmul_(normal, (product @ gamma).unsqueeze(-1), value=-1).mul_(r)

        with full_precision(dx):
            in_parts(part, *map(rows_of, (dy, normal, r, dx)))
        grads.add(layer.weight, totals[0])
        if layer.bias is not None:
            grads.add(layer.bias, totals[1])
        return dx

    return y, backward


@rule(RMSNorm, nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y = γ x̂, where x̂ = x r and r = (Σ x² / C + ε)^-½ of each row.

    As LayerNorm without μ: r reaches x by dr/dx = -r³ x / C, which turns Σ g x into -r x̂ Σ(g x̂) / C:
        dx = r (g - x̂ mean(g x̂)), g = γ dy; dγ = Σ_n dy x̂.
    """
    y, normal, r = parts.rms_norm(x, layer.weight, epsilon(layer), product_type(x))

    def backward(dy: Tensor) -> Tensor:
        dx, total = parts.rms_norm_backward(dy, normal, r, layer.weight)
        grads.add(layer.weight, total)
        return dx

    return y, backward
