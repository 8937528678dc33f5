"""What all ranks agree on before an update: the loss, the gradient's scale, and whether the step is to be trusted."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from lm.data.module import IGNORED
from lm.errors import CheckError

MEMORY = 0.99  # of the running mean of the loss: about the last hundred steps
MOST_IN_A_ROW = 20


class Guard:
    """Decides what becomes of a step whose loss or gradient is not finite, or whose loss is a spike.

    The loss is the mean over all ranks and the gradient's norm that of the reduced gradient, so all decide alike.

    Args:
        on_nonfinite: "stop" ends the run before the update, "skip" leaves the batch out and counts it.
        spike: A loss above this many times its running mean is treated the same; None for none.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"] = "stop", spike: float | None = None) -> None:
        self.on_nonfinite, self.spike = on_nonfinite, spike
        self.mean, self.weight = 0.0, 0.0  # of the losses, discounted; their ratio is the running mean
        self.skipped = self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and the counts."""
        return {key: getattr(self, key) for key in ("mean", "weight", "skipped", "in_a_row")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take these over."""
        self.__dict__.update(state)

    def verdict(self, step: int, loss: float, norm: float, *, scaled: bool) -> str | None:
        """Return None where the step may be taken, else the line that says why it is left out.

        Args:
            step: Its number, counted from 1.
            loss: Mean over all ranks.
            norm: Of the gradient, before clipping.
            scaled: Whether a loss scaler expects gradients that are not finite now and then, and skips them itself.

        Raises:
            CheckError: The run is to stop; nothing was updated, so that the state may be saved.
        """
        if not math.isfinite(loss if scaled else loss + norm):
            what, advice = f"loss {loss:g} and gradient norm {norm:g} are not finite", "or longer warm-up"
        elif self.spike is not None and self.weight > 0.05 and loss > self.spike * self.mean / self.weight:
            what, advice = f"loss {loss:g} is a spike: its mean was {self.mean / self.weight:g}", "or a larger spike"
        else:
            if self.spike is not None:
                self.mean = MEMORY * self.mean + (1 - MEMORY) * loss
                self.weight = MEMORY * self.weight + (1 - MEMORY)
            self.in_a_row = 0
            return None
        if self.on_nonfinite == "stop" or self.in_a_row == MOST_IN_A_ROW:
            error = CheckError(
                f"step {step}: {what}: nothing was updated; continue with --ckpt_path last and a lower learning rate "
                + advice
                + (f" ({self.in_a_row} steps in a row were skipped)" if self.in_a_row else "")
            )
            error.at_boundary = True
            raise error
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return f"step {step}: {what}: the batch was skipped, {self.skipped} so far"


def share_loss(
    losses: list[Tensor], targets: list[Tensor], world_size: int, others: list[float], group: Any = None
) -> tuple[float, float, list[float]]:
    """Return the mean loss over the predictions of all micro-batches and ranks, and the gradient's missing factor.

    Each micro-batch's loss is its sum over the predictions, divided by its number of targets: the same number on all
    ranks, known beforehand, so that gradients can be added and averaged while they are made. Where some targets are
    not predicted, positions / predictions makes it the mean over the predictions: each token weighs the same, wherever
    it was.

    Args:
        losses: Of the micro-batches of this rank, each ().
        targets: Theirs, (B, T) or (B,).
        world_size: Number of ranks.
        others: What else is to be added up over the ranks: whoever waits for them once need not do so twice. Returned
            third.
        group: Of the ranks; all of this process's by default.
    """
    positions = sum(one.numel() for one in targets)
    nats = torch.stack([loss * one.numel() for loss, one in zip(losses, targets, strict=True)]).sum()
    predicted = torch.stack([(one != IGNORED).sum() for one in targets]).sum()
    dtype = torch.float32 if nats.device.type == "mps" else torch.float64
    rest = torch.tensor(others, dtype=dtype, device=nats.device)
    sums = torch.cat([torch.stack([nats.to(dtype), predicted.to(dtype)]), rest])  # (2 + others,)
    if world_size > 1:
        distributed.all_reduce(sums, group=group)
    total, count, *others = sums.tolist()
    return total / max(1, count), positions * world_size / max(1, count), others


def share_gradient(gradients: list[Tensor], *step: Any) -> tuple[float, list[float]]:
    """Share the loss of a step, `share_loss` of the rest, and give its gradient the missing factor, in place."""
    loss, factor, others = share_loss(*step)
    if factor != 1:
        torch._foreach_mul_(local(gradients), factor)
    return loss, others


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together; of sharded ones, the norm over all shards."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's shares of sharded tensors, the same memory; whole tensors stay as they are."""
    return [one.to_local() if isinstance(one, DTensor) else one for one in tensors]


def clip(gradients: list[Tensor], most: float, norm: Tensor) -> None:
    """Scale gradients down to a norm of at most `most`, as torch's clip_grads_with_norm_; sharded ones too.

    Args:
        gradients: Changed in place.
        most: Largest norm.
        norm: Theirs, over all shards.
    """
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local(gradients), factor)
