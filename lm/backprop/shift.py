"""The rule of the token shift.

Shapes: B batch, T time, C channels (n_embd).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lm.backprop.rules import Backward, Gradients, rule
from lm.models.parts import precise
from lm.models.shift import TokenShift, earlier, seen


@rule(TokenShift)
def token_shift(layer: TokenShift, grads: Gradients, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Backward]:
    """y_t = (1 - w) x_t + w x_(t-1): x_t is in y_t and in y_(t+1), so dx_t = (1 - w) dy_t + w dy_(t+1).

    A channel's w is used at every position: dw = Σ_bt dy_t (x_(t-1) - x_t). Where a mask hides x_(t-1) from y_t, it is
    zero in both sums.
    """

    def backward(dy: Tensor) -> Tensor:
        grads.add(layer.weight, (precise(dy) * precise(earlier(x, mask) - x)).sum((0, 1)))  # (B, T, C) -> (C,)
        later = F.pad(seen(dy, mask), (0, 0, -1, 1))  # all but the first, then zeros
        return torch.lerp(dy, later, layer.weight.to(dy.dtype))

    return torch.lerp(x, earlier(x, mask), layer.weight.to(x.dtype)), backward
