"""PairModel: fits a network to pairs of answers, of which one is preferred.

Shapes: B pairs, T tokens, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lm.backprop import run
from lm.backprop.policy import preference
from lm.bounds import checked
from lm.data.module import IGNORED
from lm.errors import UserError
from lm.posttraining.by_hand import ByHand, all_count
from lm.training import LanguageModel
from lm.training.metrics import PairLoss

Scores = tuple[Tensor, Callable[[Tensor], Tensor]]
"""The scores of pairs (B, 2), and the function from their gradient to the logits'."""


class PairModel(LanguageModel):
    """The half that is the same for all objectives on pairs: what each makes of the logits is `scores`.

    The data is `lm.data.PairData`.

    Args:
        smoothing: The share of pairs that are taken to be labelled the wrong way round.
        settings: All that `LanguageModel` takes.
    """

    learns_from = "pairs"

    @checked("model.", UserError)
    def __init__(self, *, smoothing: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.smoothing = smoothing
        self.eval_loss = PairLoss()

    @abstractmethod
    def scores(self, logits: Tensor, targets: Tensor, rows: Tensor) -> Scores:
        """Return the scores of pairs.

        Args:
            logits: (B, 2, T, V).
            targets: int64 (B, 2, T), IGNORED outside of the answers.
            rows: The pairs' numbers in the data (B,).
        """

    def check_logits(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Return logits of texts (2 B, T, V) as those of pairs (B, 2, T, V), after a look at their shape."""
        if logits.shape[:-1] != tokens.flatten(0, 1).shape:
            raise UserError(
                f"model.net {type(self.net).__name__} gives logits {tuple(logits.shape)}: pairs need one prediction a "
                "token, as lm.models.GPT has"
            )
        pairs: Tensor = logits.unflatten(0, (-1, 2))
        return pairs

    def loss(self, *batch: Tensor) -> Tensor:
        """Return a micro-batch's loss, whose backward pass follows."""
        tokens, targets, rows = batch
        logits = self.check_logits(self(tokens.flatten(0, 1)), tokens)  # (B, 2, T) -> (2 B, T, V) -> (B, 2, T, V)
        scores, _ = self.scores(logits, targets, rows)
        loss = preference(scores[:, 0] - scores[:, 1], self.smoothing)[0].mean()
        self.step.note(loss, all_count(tokens))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add pairs to the evaluation's sums."""
        tokens, targets, rows = batch
        logits = self.check_logits(self(tokens.flatten(0, 1)), tokens)
        scores, _ = self.scores(logits, targets, rows)
        margins = (scores[:, 0] - scores[:, 1])[(targets != IGNORED).flatten(1).any(1)]  # all but a rank's padding
        self.eval_loss.update(preference(margins, self.smoothing)[0], margins)


class ManualPairs(ByHand):
    """How the same is fitted by the rules of `lm.backprop`."""

    def loss_by_hand(self, *batch: Tensor, last: bool) -> Tensor:
        """Return a micro-batch's loss, after adding its gradient."""
        tokens, targets, rows = batch
        model: Any = self
        step = self._by_hand
        if last:
            step.grads.last_pass()
        logits, backward = run(step.net, step.grads, tokens.flatten(0, 1))  # (2 B, T, V)
        scores, backward_scores = model.scores(model.check_logits(logits, tokens), targets, rows)
        losses, dmargins = preference(scores[:, 0] - scores[:, 1], model.smoothing)  # (B,)
        dmargins = dmargins * step.division.weight(all_count(tokens), dmargins.dtype) / len(rows)
        dlogits = backward_scores(torch.stack([dmargins, -dmargins], dim=1))  # (B, 2) -> (B, 2, T, V)
        backward(dlogits.flatten(0, 1))
        self.step.note(losses.mean(), all_count(tokens))
        return losses.mean()
