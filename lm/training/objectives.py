"""The training objective: a loss from logits and targets, and from how the batch is divided.

Shapes: B sequences, T tokens, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from lm.data.chunks import IGNORED
from lm.models.parts import precise
from lm.training.division import Division


class CrossEntropy:
    """The mean of -log p(target) over all predictions; its gradient by hand is lm.backprop.loss.cross_entropy."""

    def __call__(self, logits: Tensor, targets: Tensor, division: Division) -> Tensor:
        """Return a micro-batch's loss, (); for a divided batch, scaled as `Division.share` expects it.

        Args:
            logits: (B, T, V), or (B, V) of a fixed context.
            targets: (B, T), or (B,).
            division: Of the batch.
        """
        if division.parts == 1:
            return F.cross_entropy(*_flat(logits, targets), ignore_index=IGNORED)
        return self.nats(logits, targets) / targets.numel()

    def nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over all predictions, ()."""
        return F.cross_entropy(*_flat(logits, targets), ignore_index=IGNORED, reduction="sum")


def _flat(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return precise(logits).flatten(0, -2), targets.flatten()  # (B T, V), (B T,)
