"""Cross-entropy and its gradient, and the output head that makes its logits.

Shapes: N predictions (all leading dimensions together), V vocabulary, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.backprop.rules import Gradients
from lm.models.parts import precise, rows_of

CHUNK = 1 << 22
"""Logits that are computed at a time on a CPU: 16 MiB in float32, which its caches hold. A GPU, which would wait for
so many small products to start, gets 64 times as many."""


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of the predictions whose target counts, and its gradient by the logits.

    With p = softmax(z), the loss of a prediction is -log p_y = log Σ_j e^{z_j} - z_y. The first term's derivative by
    z_j is e^{z_j} / Σ e^z = p_j, the second's is 1 at y: dz = (p - onehot(y)) / n. Subtracting the largest logit first
    changes neither.

    Args:
        logits: (…, V).
        targets: int64 (…).
        ignore_index: The target that does not count.
        scale: Factor on the gradient.

    Returns:
        The loss, and the gradient (…, V) of scale times it.
    """
    rows, flat = precise(rows_of(logits)), targets.flatten()  # (N, V), (N,)
    count = (flat != ignore_index).sum().clamp(min=1).to(rows.dtype)  # not the default float32
    total, drows = _summed(rows, flat, scale / count, ignore_index)
    return total / count, drows.view(logits.shape)


def _summed(logits: Tensor, targets: Tensor, weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of logits (N, V), and weight times its gradient."""
    counts = (targets != ignore_index).unsqueeze(1)  # (N, 1)
    index = targets.unsqueeze(1).clamp(min=0)  # an ignored target may be no index at all
    logprobs = torch.log_softmax(logits, dim=1)  # (N, V)
    loss = -(logprobs.gather(1, index) * counts).sum()
    weights = weight * counts  # (N, 1)
    dlogits = logprobs.exp_().mul_(weights)  # p, once its logarithm is no longer needed
    return loss, dlogits.scatter_add_(1, index, -weights.to(dlogits.dtype))


def head_and_loss(
    head: nn.Linear,
    grads: Gradients,
    x: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Go through the output head and the mean cross-entropy, there and back, a chunk of predictions at a time.

    The gradient of a prediction's loss needs nothing of the others but their number. So the logits of a large
    vocabulary, the largest tensor of a training step, need not exist all at once.

    Args:
        head: Makes logits z = x Wᵀ + b.
        grads: Takes dW = Σ dzᵀ x and db = Σ dz.
        x: (…, C).
        targets: int64 (…).
        soft_cap: Logits are c tanh(z / c), of which the derivative is 1 - tanh²(z / c); None leaves them.
        ignore_index: The target that does not count.
        scale: Factor on the gradient.

    Returns:
        The loss, and the gradient of scale times it by x: dz W.
    """
    rows, flat = rows_of(x), targets.flatten()  # (N, C), (N,)
    count = (flat != ignore_index).sum().clamp(min=1).to(precise(x[:0]).dtype)  # not the default float32
    size = max(1, (CHUNK if x.device.type == "cpu" else 64 * CHUNK) // head.out_features)
    total = torch.zeros_like(count)
    drows, kept = [], []
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    for some, wanted in zip(rows.split(size), flat.split(size), strict=True):
        logits = precise(F.linear(some, head.weight, head.bias))  # (n, C) -> (n, V)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        loss, dlogits = _summed(logits, wanted, scale / count, ignore_index)
        total = total + loss
        if grads.keep_dlogits:
            kept.append(dlogits.clone())
        if soft_cap is not None:
            dlogits *= 1 - (logits / soft_cap).square()
        part = dlogits.mT @ some  # (V, n) @ (n, C) -> (V, C)
        dweight = part if dweight is None else dweight.add_(part)
        dbias = dlogits.sum(0) if dbias is None else dbias.add_(dlogits.sum(0))
        drows.append(dlogits @ head.weight)  # (n, V) @ (V, C) -> (n, C)
    if grads.keep_dlogits:
        grads.dlogits = torch.cat(kept)
    assert dweight is not None and dbias is not None
    grads.add(head.weight, dweight)
    if head.bias is not None:
        grads.add(head.bias, dbias)
    return total / count, (drows[0] if len(drows) == 1 else torch.cat(drows)).view(x.shape)
