"""What all objectives here share when they are trained by hand-derived gradients."""

import torch
from torch import Tensor

from lm.errors import UserError
from lm.training import ManualLanguageModel


class ByHand(ManualLanguageModel):
    """Trains by the rules of `lm.backprop`; an objective says how in `loss_by_hand`."""

    compiles = False

    def setup(self, stage: str) -> None:
        """Refuse what is for the cross-entropy of texts alone."""
        super().setup(stage)
        for name, value in {"compile": self.compiled, "audit_every": self.audit_every}.items():
            if value:
                raise UserError(f"model.{name} is for lm.training.ManualLanguageModel: leave it out")


def all_count(tokens: Tensor) -> Tensor:
    """Return targets of which none is ignored, of the shape of tokens: each pair weighs the same, however long."""
    return torch.zeros((), dtype=torch.int64, device=tokens.device).expand_as(tokens)
