"""DPO: a policy learned from pairs directly, without a reward model.

Shapes: B pairs, N pairs of the data, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from lm.backprop.policy import log_probabilities
from lm.bounds import checked
from lm.data.module import IGNORED
from lm.errors import UserError
from lm.posttraining.pair_model import ManualPairs, PairModel, Scores


class DPO(PairModel):
    """Fits a policy to pairs (Rafailov et al., "Direct Preference Optimization", 2023).

    A text's implicit reward is beta log(π(text) / π_ref(text)), summed over the answer's tokens; the preferred one is
    to get the larger. The reference π_ref is the network as training begins, an SFT run's by --init_from. Its
    log-probabilities of all pairs are computed once, before the first step, and kept in the checkpoint.

    Args:
        beta: How much a change of a log-probability is worth: the larger, the closer to the reference.
        settings: All that `PairModel` takes.
    """

    reference: Tensor  # log-probabilities (N, 2), NaN until they are known

    @checked("model.", UserError)
    def __init__(self, *, beta: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.beta = beta

    def configure_model(self) -> None:
        """Build the network, and make room for the reference's log-probabilities."""
        if self.net is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            super().configure_model()
            self.register_buffer("reference", torch.full((len(data.pairs), 2), torch.nan))

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Compute the reference's log-probabilities, unless a checkpoint had them."""
        if not self.reference.isnan().any():
            return
        assert self.net is not None
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        training = self.net.training
        self.net.eval()
        with self.trainer.precision_plugin.forward_context():
            for numbers in torch.arange(len(data.pairs)).split(data.batch_size):
                tokens, targets, rows = (one.to(self.device) for one in data.batch(numbers.tolist()))
                logits = self.check_logits(self(tokens.flatten(0, 1)), tokens)
                self.reference[rows] = log_probabilities(logits, targets)[0].sum(-1).to(self.reference.dtype)
        self.net.train(training)

    def scores(self, logits: Tensor, targets: Tensor, rows: Tensor) -> Scores:
        """Return beta (log π - log π_ref): each of an answer's log-probabilities has beta times its gradient."""
        logs, backward = log_probabilities(logits, targets, ignore_index=IGNORED)  # (B, 2, T)
        scores = self.beta * (logs.sum(-1) - self.reference[rows])
        return scores, lambda dscores: backward((self.beta * dscores).unsqueeze(-1).expand_as(logs))


class ManualDPO(DPO, ManualPairs):
    """The same, by gradients derived by hand."""
