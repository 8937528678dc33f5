"""Normalisations of the last dimension."""

from typing import Literal

from torch import nn

Norm = Literal["layer", "rms", "none"]


def make_norm(kind: Norm, size: int, *, bias: bool, eps: float = 1e-5) -> nn.Module:
    """Return a normalisation of the last dimension; both kinds begin with weight one."""
    if kind == "layer":
        return nn.LayerNorm(size, eps=eps, bias=bias)
    return nn.RMSNorm(size, eps=eps) if kind == "rms" else nn.Identity()
