"""Whether a step is to be trusted, and how large its gradient may be: all ranks decide alike."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lm.errors import CheckError, setting

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
        self.cause = ""
        """Why the loss of the step in progress cannot be finite, where that is known."""

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
        advice = "a lower learning rate or "
        if not math.isfinite(loss if scaled else loss + norm):
            what = self.cause or f"loss {loss:g} and gradient norm {norm:g} are not finite"
            advice += "longer warm-up"
            if self.cause:
                advice = "a corrected reward" + (" or model.on_nonfinite skip" if self.on_nonfinite == "stop" else "")
        elif self.spike is not None and self.weight > 0.05 and loss > self.spike * self.mean / self.weight:
            what = f"loss {loss:g} is a spike: its mean was {self.mean / self.weight:g}"
            advice += "a larger spike"
        else:
            if self.spike is not None:
                self.mean = MEMORY * self.mean + (1 - MEMORY) * loss
                self.weight = MEMORY * self.weight + (1 - MEMORY)
            self.in_a_row = 0
            return None
        if self.on_nonfinite == "stop" or self.in_a_row == MOST_IN_A_ROW:
            advice += f" ({self.in_a_row} steps in a row were skipped)" if self.in_a_row else ""
            error = CheckError(
                f"step {step}: {what}: nothing was updated; continue with {setting('ckpt_path')} last and {advice}"
            )
            error.at_boundary = True
            raise error
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return f"step {step}: {what}: the batch was skipped, {self.skipped} so far"


class Later:
    """Numbers on their way from a GPU, which nothing waits for until they are read.

    Args:
        numbers: Computed on it, perhaps not yet.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._there: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        """Return them."""
        if self._there is not None:
            self._there.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


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
