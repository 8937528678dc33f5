"""DPO: a policy learned from pairs directly, without a reward model.

Shapes: B pairs, N pairs of the data, T tokens, V vocabulary.
"""

import zlib
from typing import Any

import torch
from torch import Tensor

from lm.backprop.policy import log_probabilities
from lm.bounds import checked
from lm.data.module import IGNORED
from lm.data.pairs import Pair
from lm.errors import UserError, setting
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
    reference_pairs: Tensor  # a checksum of the pairs that they are of

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
            self.register_buffer("reference_pairs", torch.tensor(checksum(data.pairs)))
            self._checksum = int(self.reference_pairs)  # of the data that are here, whatever a checkpoint has

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Compute the reference's log-probabilities, unless a checkpoint had them."""
        if not self.reference.isnan().any():
            self._check_pairs()
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

    def on_validation_start(self) -> None:
        """Refuse other pairs than those the reference's log-probabilities are of."""
        super().on_validation_start()
        self._check_pairs()

    def _check_pairs(self) -> None:
        if int(self.reference_pairs) != self._checksum:
            raise UserError(
                "data.corpus: its pairs are not those that the checkpoint's reference log-probabilities are of: use "
                f"those, or begin a run with {setting('init_from')}"
            )

    def scores(self, logits: Tensor, targets: Tensor, rows: Tensor) -> Scores:
        """Return beta (log π - log π_ref): each of an answer's log-probabilities has beta times its gradient."""
        logs, backward = log_probabilities(logits, targets, ignore_index=IGNORED)  # (B, 2, T)
        scores = self.beta * (logs.sum(-1) - self.reference[rows])
        return scores, lambda dscores: backward((self.beta * dscores).unsqueeze(-1).expand_as(logs))


def checksum(pairs: list[Pair]) -> int:
    """Return a number that other pairs, or these in another order, do not have."""
    found = 0
    for pair in pairs:
        for one in pair:
            found = zlib.crc32(one.ids.tobytes(), zlib.crc32(len(one.ids).to_bytes(8, "little"), found))
    return found


class ManualDPO(DPO, ManualPairs):
    """The same, by gradients derived by hand."""
