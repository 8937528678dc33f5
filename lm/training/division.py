"""How a global batch is divided over ranks and micro-batches, and how its loss becomes one again.

Each micro-batch's loss is its sum over the predictions, divided by its number of targets: the same number everywhere,
known beforehand, so that gradients can be added and averaged while they are made. Where some targets are not predicted,
targets / predictions makes it the mean over the predictions: each token weighs the same, wherever it was.

Shapes: B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from lm.data.chunks import IGNORED


@dataclass(frozen=True)
class Division:
    """How many parts a global batch has.

    Args:
        ranks: Processes that share it.
        micro_batches: Of a step, on each rank.
    """

    ranks: int = 1
    micro_batches: int = 1

    @property
    def parts(self) -> int:
        """Micro-batches of a step, on all ranks together."""
        return self.ranks * self.micro_batches

    def weight(self, targets: Tensor, dtype: torch.dtype) -> float | Tensor:
        """Return what the mean loss over a micro-batch's predictions weighs in the mean over this rank's targets.

        Args:
            targets: Of the micro-batch, (B, T) or (B,).
            dtype: The network's.
        """
        if self.parts == 1:
            return 1.0
        return (targets != IGNORED).sum().to(dtype) / (targets.numel() * self.micro_batches)

    def share(
        self, losses: Sequence[Tensor], targets: Sequence[Tensor], others: Sequence[float] = (), group: Any = None
    ) -> tuple[float, float, list[float]]:
        """Return the mean loss over the predictions of all micro-batches and ranks, and the gradient's missing factor.

        Args:
            losses: Of the micro-batches of this rank, each ().
            targets: Theirs, (B, T) or (B,).
            others: What else is to be added up over the ranks: whoever waits for them once need not do so twice.
                Returned third.
            group: Of the ranks; all of this process's by default.
        """
        positions = sum(one.numel() for one in targets)
        nats = torch.stack([loss * one.numel() for loss, one in zip(losses, targets, strict=True)]).sum()
        predicted = torch.stack([(one != IGNORED).sum() for one in targets]).sum()
        dtype = torch.float32 if nats.device.type == "mps" else torch.float64
        rest = torch.tensor(others, dtype=dtype, device=nats.device)
        sums = torch.cat([torch.stack([nats.to(dtype), predicted.to(dtype)]), rest])  # (2 + others,)
        if self.ranks > 1:
            distributed.all_reduce(sums, group=group)
        total, count, *summed = sums.tolist()
        return total / max(1, count), positions * self.ranks / max(1, count), summed
