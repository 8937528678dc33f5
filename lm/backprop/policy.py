"""What training by preferences and rewards minimises, and its gradient.

Each loss here is a function of a few numbers a text or a token, and is returned with its derivative by them.
`log_probabilities` takes a derivative by log-probabilities on to the logits. So every policy loss is a weighted
cross-entropy: where dL/d log p(y) = w, the gradient by the logits is w (onehot(y) - softmax).

Shapes: N texts or tokens, T tokens of a text, V vocabulary; … any leading dimensions.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lm.models.parts import precise


def log_probabilities(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return each target's log-probability, and the function from its gradient to the logits'.

    log p_y = z_y - log Σ_j e^{z_j}, of which the derivative by z_j is 1[j = y] - p_j: dz = dl (onehot(y) - p).

    Args:
        logits: (…, T, V).
        targets: int64 (…, T).
        ignore_index: The target that does not count: its log-probability is 0.
    """
    counts, index = targets != ignore_index, targets.clamp(min=0).unsqueeze(-1)
    logs = precise(logits).log_softmax(-1)  # (…, T, V)
    found = logs.gather(-1, index).squeeze(-1).where(counts, 0.0)  # (…, T)

    def backward(dlogs: Tensor) -> Tensor:
        weights = dlogs.where(counts, 0.0).unsqueeze(-1)  # (…, T, 1)
        return (-weights * logs.exp()).scatter_add(-1, index, weights)

    return found, backward


def entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return how undecided each prediction is, and the function from its gradient to the logits'.

    H = -Σ_j p_j l_j, with l = log p. As dp_j/dz_i = p_j (1[i = j] - p_i) and dl_j/dz_i = 1[i = j] - p_i,
        dH/dz_i = -Σ_j l_j p_j (1[i = j] - p_i) - Σ_j p_j (1[i = j] - p_i) = -p_i l_i - p_i H - (p_i - p_i),
    which is -p_i (l_i + H): what is likelier than average, l_i > -H, is to become less likely.

    Args:
        logits: (…, T, V).
        targets: int64 (…, T).
        ignore_index: The target at which nothing counts: the entropy there is 0.
    """
    counts = targets != ignore_index
    logs = precise(logits).log_softmax(-1)  # (…, T, V)
    chances = logs.exp()
    found = -(chances * logs).sum(-1)  # (…, T)

    def backward(dentropy: Tensor) -> Tensor:
        return dentropy.where(counts, 0.0).unsqueeze(-1) * -chances * (logs + found.unsqueeze(-1))

    return found.where(counts, 0.0), backward


def preference(margins: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the loss of pairs of which the better one leads by a margin, and its derivative.

    Bradley and Terry (1952): the better one wins with probability σ(m). Where a share ε of the labels is wrong, the
    loss is -(1 - ε) log σ(m) - ε log σ(-m). As d log σ(m) / dm = σ(-m) = 1 - σ(m), the derivative is
    -(1 - ε) (1 - σ(m)) + ε σ(m) = σ(m) - (1 - ε).

    Args:
        margins: The better one's score minus the other's (N,).
        smoothing: The share ε of labels that are taken to be wrong.

    Returns:
        Both (N,).
    """
    loss = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    return loss, torch.sigmoid(margins) - (1 - smoothing)


def clipped(logs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return the loss of tokens that were drawn from an older policy, and its derivative by their log-probabilities.

    Schulman et al., "Proximal Policy Optimization Algorithms" (2017): with the ratio r = exp(l - l_old), the loss is
    -min(r A, clip(r, 1 - c, 1 + c) A). As dr/dl = r, the first product's derivative is -r A; the second is constant
    where it is the smaller one, so its is 0. Where r = 1, this is the gradient of REINFORCE, -A.

    Args:
        logs: Log-probabilities (N, T).
        old: Those of the policy that drew the tokens (N, T).
        advantages: By how much each token was better than expected (N, T).
        clip: c.

    Returns:
        Both (N, T).
    """
    ratio = (logs - old).exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, bounded), torch.where(free <= bounded, -free, 0.0)


def value_error(values: Tensor, earned: Tensor) -> tuple[Tensor, Tensor]:
    """Return half the squared error of what a value network expects, ½ (V - R)², and its derivative by V: V - R.

    Args:
        values: V, what the rest of a text was expected to earn from a token on (N, T).
        earned: R, a better estimate of it, which is held fixed (N, T).

    Returns:
        Both (N, T).
    """
    error = values - earned
    return error * error / 2, error
