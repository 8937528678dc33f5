"""How any network is evaluated: sums over a whole split, divided at the end.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassExactMatch

from lm.data.module import IGNORED
from lm.training.loggers.step_log import StepLog
from lm.training.metrics import Sums, TokenLoss
from lm.training.objectives import CrossEntropy

COUNTS = ("tokens", "pairs")  # of what an evaluation's mean is over


class Evaluated(LightningModule):
    """The half of `LanguageModel` that evaluates; the other half fits."""

    net: nn.Module | None
    token_lengths: Tensor  # bytes of each id (V,)
    writes: bool

    def __init__(self) -> None:
        super().__init__()
        self.validation: dict[str, float] = {}
        """The newest validation metrics, "step" among them."""
        self.eval_loss: Sums = TokenLoss()
        self.exact_match: MulticlassExactMatch | None = None
        self.share_right = "exact_match"
        """What the share of examples that are predicted rightly is called."""
        self.step_log = StepLog()
        self.objective = CrossEntropy()

    @property
    def logged(self) -> set[str]:
        """The names of what an evaluation gives, once the data are known."""
        names = {*self.eval_loss.names, *([self.share_right] if self.exact_match is not None else [])}
        return names if self.writes else names - {"bits_per_byte"}  # only a text has bytes

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch of tokens (B, T) and targets (B, T) or (B,) to the evaluation's sums."""
        tokens, targets = batch
        logits = self(tokens)  # (B, T, V), or (B, V)
        nats = self.objective.nats(logits, targets)
        predicted = targets[targets != IGNORED]
        self.eval_loss.update(nats, predicted.numel(), self.token_lengths[predicted].sum())
        # if every argmax is right given the right tokens before it, so is greedy generation
        if self.exact_match is not None and predicted.numel():
            self.exact_match.update(logits.argmax(-1), targets)

    def on_validation_epoch_end(self) -> None:
        """Publish the evaluation: `val_loss` for callbacks, all of it for the loggers."""
        values = self.eval_loss.compute()
        self.eval_loss.reset()
        self.validation = {"step": self.global_step} | {key: float(value) for key, value in values.items()}
        self.validation |= {key: int(values[key]) for key in COUNTS if key in values}
        if self.exact_match is not None:
            self.validation[self.share_right] = float(self.exact_match.compute())
            self.exact_match.reset()
        shown = {key: value for key, value in self.validation.items() if key not in ("step", *COUNTS)}
        if self.trainer.state.fn != "fit":  # what a Trainer's own validate and test return; ranks have one sum already
            kind = "test" if self.trainer.state.fn == "test" else "val"
            self.log_dict({f"{kind}_{key}": value for key, value in shown.items()})
            return
        self.log("val_loss", shown["loss"], logger=False)
        if not self.trainer.sanity_checking:
            self.write({f"val/{key}": value for key, value in shown.items()}, self.global_step)

    def on_validation_end(self) -> None:
        """Keep the time of the evaluation out of tokens_per_second."""
        self.step_log.restart_clock(self.global_step)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the evaluation's sums."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Publish the evaluation."""
        self.on_validation_epoch_end()

    def write(self, values: dict[str, Any], step: int) -> None:
        """Give values to the loggers, under the number of finished steps, and to callbacks that monitor them."""
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics({k: v for k, v in values.items() if not math.isnan(v)}, step=step)
