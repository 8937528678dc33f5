"""RewardModel: a network that gives each text a number, learned from pairs of which one is preferred.

Shapes: B pairs, T tokens.
"""

import torch
from torch import Tensor, nn

from lm.data.module import IGNORED
from lm.errors import UserError
from lm.models.parts import precise
from lm.posttraining.pair_model import ManualPairs, PairModel, Scores


def scalar_head(net: nn.Module) -> None:
    """Put a head with one output in place of a network's head over the vocabulary; it begins at zero.

    A soft cap is for logits: no bound stays on the number.

    Raises:
        UserError: The network has no such head.
    """
    head = getattr(net, "lm_head", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model.net {type(net).__name__} has no lm_head to be replaced by one output: use lm.models.GPT"
        )
    net.lm_head = nn.Linear(head.in_features, 1, bias=False, device=head.weight.device, dtype=head.weight.dtype)
    nn.init.zeros_(net.lm_head.weight)
    if hasattr(net, "logit_soft_cap"):
        net.logit_soft_cap = None  # type: ignore[assignment]


class RewardModel(PairModel):
    """Fits a reward: of a pair, the one that is preferred gets the larger number (Christiano et al., 2017).

    The network's head over the vocabulary is replaced by one with a single output, which is read at the answer's last
    token, the end of the turn: what pads a sequence after it changes nothing. --init_from begins with another run's
    weights, an SFT run's say.
    """

    writes = False

    def change_network(self) -> None:
        """Give the network its head."""
        assert self.net is not None
        scalar_head(self.net)

    def scores(self, logits: Tensor, targets: Tensor, rows: Tensor) -> Scores:
        """Return the rewards: r = logit at the last token, so dr goes there and nowhere else."""
        values, last = precise(logits)[..., 0], last_token(targets)  # (B, 2, T), (B, 2, 1)

        def backward(dscores: Tensor) -> Tensor:
            return torch.zeros_like(values).scatter(-1, last, dscores.unsqueeze(-1)).unsqueeze(-1)  # (B, 2, T, 1)

        return values.gather(-1, last).squeeze(-1), backward


class ManualRewardModel(RewardModel, ManualPairs):
    """The same, by gradients derived by hand."""


def last_token(targets: Tensor) -> Tensor:
    """Return where each text's last token is, (…, 1): after the position that predicts it."""
    T = targets.shape[-1]  # noqa: N806
    places = torch.arange(1, T + 1, device=targets.device)  # (T,)
    return (places * (targets != IGNORED)).amax(-1, keepdim=True).clamp(max=T - 1)
