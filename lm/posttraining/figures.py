"""What is logged of a policy's step: means over its texts and tokens, of all micro-batches and processes."""

import torch
from torch import Tensor

from lm.training.metrics import Sums, wide


class StepFigures(Sums):
    """Sums over a step's texts or tokens, and the largest ratio of new to old probability."""

    names = ("reward", "kl", "finished", "answer_tokens", "entropy", "clipped", "value_loss")
    sums: Tensor  # of each name, and how many numbers it is of (names, 2)
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.names), 2, dtype=wide()), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros((), dtype=wide()), dist_reduce_fx="max")

    def update(self, ratio: Tensor, **values: Tensor) -> None:
        """Add a micro-batch: the ratios of its tokens, and under each name numbers of its texts or tokens."""
        self.largest = torch.maximum(self.largest, ratio.max().to(self.largest))
        for name, value in values.items():
            here = self.sums[self.names.index(name)]
            here += torch.stack([value.sum().to(here), torch.tensor(value.numel()).to(here)])

    def compute(self) -> dict[str, float]:
        """Return the means of what was added, and the largest ratio."""
        rows = dict(zip(self.names, self.sums.tolist(), strict=True))
        return {name: total / count for name, (total, count) in rows.items() if count} | {"ratio": float(self.largest)}
