"""Normalisations of the last dimension."""

from typing import Literal

import torch
from torch import Tensor, nn

from lm.models.parts import RMS, in_parts_pay

Norm = Literal["layer", "rms", "none"]


class RMSNorm(nn.RMSNorm):
    """torch's, of input in fewer bits, too, which it computes in its weight's; trained on a CPU, in fewer passes."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C) to (…, C) of the same type."""
        if in_parts_pay(x):
            return RMS.apply(x, self.weight, epsilon(self))  # type: ignore[no-untyped-call]
        return super().forward(x.to(self.weight.dtype)).type_as(x)


def epsilon(layer: nn.RMSNorm) -> float:
    """Return what a layer adds to the mean square."""
    return torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps


def make_norm(kind: Norm, size: int, *, bias: bool, eps: float = 1e-5) -> nn.Module:
    """Return a normalisation of the last dimension; both kinds begin with weight one."""
    if kind == "layer":
        return nn.LayerNorm(size, eps=eps, bias=bias)
    return RMSNorm(size, eps=eps) if kind == "rms" else nn.Identity()
