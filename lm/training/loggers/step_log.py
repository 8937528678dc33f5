"""The metrics of training steps: the mean loss since the last logged step, tokens so far, learning rates."""

import math
import time
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer


class StepLog:
    """Averages the loss between two logged steps, and counts the tokens of the whole run.

    Both are saved, so that a resumed run logs what an uninterrupted one would have.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._begin_average(0.0, 0)
        self._first = (0, 0)  # the step resumed from, and the tokens up to it: the batch size may have changed
        self._clock = (0.0, 0)  # time and step at which the throughput measurement began
        self._targets: list[Tensor] = []  # of the micro-batches of the step in progress
        self._world_size = 1
        self._groups: list[dict[str, Any]] = []
        self._rates: dict[str, int] = {}  # the name of each learning rate, and a parameter group that has it

    def start(
        self, trainer: Trainer, targets: list[Tensor], optimizer: Optimizer, settings: list[dict[str, Any]]
    ) -> None:
        """Start training.

        Args:
            trainer: Knows the step, the device and the number of ranks.
            targets: A list that always holds the targets of the step in progress, a tensor for each micro-batch.
            optimizer: Its `group_names`, where it has them, name its parameter groups' learning rates.
            settings: Each parameter group's settings, as configured.
        """
        self._device, self._targets, self._world_size = trainer.strategy.root_device, targets, trainer.world_size
        self._begin_average(float(self._total), self._steps)
        self._groups = optimizer.param_groups
        self._rates = rate_names([group["lr"] for group in settings], getattr(optimizer, "group_names", None))
        self.restart_clock(trainer.global_step)

    def _begin_average(self, total: float, steps: int) -> None:
        """Start with the sum of `steps` losses: a float on a CPU, elsewhere a tensor, so that adding does not wait."""
        self._total: Tensor | float = total
        self._steps = steps
        if self._device.type != "cpu":
            dtype = torch.float32 if self._device.type == "mps" else torch.float64  # Apple's GPUs have no float64
            self._total = torch.tensor(total, dtype=dtype, device=self._device)

    def restart_clock(self, step: int) -> None:
        """Leave the time before now, an evaluation's for example, out of tokens_per_second."""
        self._clock = (time.monotonic(), step)

    def add(self, loss: Tensor | float) -> None:
        """Count the loss of a step: the mean over its predictions, of all ranks and micro-batches."""
        self._total += loss if isinstance(self._total, Tensor) else float(loss)  # on a CPU, 3 µs and 0.2 µs
        self._steps += 1

    def line(self, step: int, loss: Tensor | float, gradient_norm: Tensor) -> dict[str, float]:
        """Return the metrics of a step, the last of those averaged, and begin the next average."""
        (began, first), now = self._clock, time.monotonic()
        metrics = {
            "step": step,
            "loss": float(self._total) / self._steps if self._steps else math.nan,  # nan: all were skipped
            "loss_step": float(loss),
            **{name: self._groups[i]["lr"] for name, i in self._rates.items()},
            "gradient_norm": float(gradient_norm),
            "tokens": self.tokens(step),
            "tokens_per_second": (step - first) * self._tokens_per_step() / max(1e-9, now - began),
        }
        self._clock = (now, step)
        self._begin_average(0.0, 0)
        return metrics

    def tokens(self, step: int) -> int:
        """Return how many tokens the run has trained on after so many steps."""
        return self._first[1] + self.tokens_since_start(step)

    def tokens_since_start(self, step: int) -> int:
        """Return how many of these tokens this start of the run has trained on."""
        return (step - self._first[0]) * self._tokens_per_step()

    def _tokens_per_step(self) -> int:
        return sum(targets.numel() for targets in self._targets) * self._world_size

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a run needs to resume after a step."""
        return {"tokens": self.tokens(step), "loss_total": float(self._total), "loss_steps": self._steps}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Resume after a step."""
        self._first = (step, state["tokens"])
        self._begin_average(state["loss_total"], state["loss_steps"])


def rate_names(rates: list[float], names: list[str] | None = None) -> dict[str, int]:
    """Return under which names the learning rates of parameter groups are logged, and the group of each.

    Args:
        rates: Each group's learning rate, as configured.
        names: The optimizer's name for each group, "" for the usual kind: Muon's rate is learning_rate_muon. Without
            names, the first rate is learning_rate, and a different one, first seen in group i, is learning_rate_i.
    """
    if names is None or "" not in names:
        firsts = {rate: rates.index(rate) for rate in rates}
        return {f"learning_rate_{i}" if i else "learning_rate": i for i in firsts.values()}
    usual = {"learning_rate": names.index("")}
    return usual | {f"learning_rate_{name}": names.index(name) for name in names if name}
