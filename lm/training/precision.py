"""`trainer.precision auto`: which precision trains a recipe's network faster on this machine, measured in a second.

Shapes: B sequences, T tokens.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lm.backprop import Gradients
from lm.data import chunks
from lm.data.module import TokenData
from lm.generation.packed import has_instructions
from lm.training.by_hand import StepByHand
from lm.training.callbacks.process import keep_memory
from lm.training.division import Division
from lm.training.language_model import LanguageModel
from lm.training.manual import ManualLanguageModel
from lm.training.parts import make_net

AUTO, FULL, MIXED = "auto", "32-true", "bf16-mixed"
TOKENS = 1024  # of the batch that is tried
SECONDS = 1.0
CLEARLY = 0.9  # of the time: less would not be worth other numbers


def choose(module: LanguageModel, data: TokenData, device: torch.device) -> tuple[str, str]:
    """Return the precision of the faster gradients, bf16-mixed or 32-true, and the reason in words.

    They are those of the recipe's own network, uncompiled, on a batch of its data. No random state changes.

    Args:
        module: Makes the network, and says whether gradients are by hand.
        data: Set up.
        device: Where training will compute.
    """
    if device.type == "cpu" and not has_instructions():
        return FULL, "this CPU has no instructions for 16-bit floats"
    if module.steps_per_call > 1:
        return FULL, "model.steps_per_call is for full precision"
    with isolate_rng():
        net = make_net(module.make_net, data.vocab_size, data.block_size).to(device)
        batch = [one.to(device) for one in chunks.rows(data.training_examples()(0, rows(data)))]
        gradients = gradients_by_hand(net) if isinstance(module, ManualLanguageModel) else gradients_of(module, net)
        ratio = ratio_of_times(gradients, batch, device)
    if ratio < CLEARLY:
        return MIXED, f"a step takes {ratio:.2f} of the time of {FULL}; products are rounded to 8 bits"
    return FULL, f"{MIXED} takes {ratio:.2f} of its time"


def rows(data: TokenData) -> int:
    """Return how many sequences are tried."""
    return max(1, min(data.batch_size, TOKENS // data.block_size))


def gradients_of(module: LanguageModel, net: nn.Module) -> Callable[..., Any]:
    """Return what computes gradients by autograd."""

    def gradients(context: Any, tokens: Tensor, targets: Tensor) -> None:
        net.zero_grad()
        with context:
            loss = module.objective(net(tokens), targets, Division())
        loss.backward()

    return gradients


def gradients_by_hand(net: nn.Module) -> Callable[..., Any]:
    """Return what computes gradients by the rules."""
    step = StepByHand(net, list(net.parameters()), Gradients())

    @torch.no_grad()
    def gradients(context: Any, tokens: Tensor, targets: Tensor) -> None:
        step.begin()
        with context:
            step.add(tokens, targets, last=True)
        step.finish()

    return gradients


def ratio_of_times(gradients: Callable[..., Any], batch: list[Tensor], device: torch.device) -> float:
    """Return the median time in mixed precision, divided by that in full precision; both take turns for a second."""
    if device.type == "cpu":
        keep_memory()  # as in training
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while len(times[1]) < 2 or time.perf_counter() < end:
        for low, found in enumerate(times):
            began = time.perf_counter()
            gradients(torch.autocast(device.type, torch.bfloat16) if low else nullcontext(), *batch)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            found.append(time.perf_counter() - began)
    full, mixed = (median(found[1:]) for found in times)  # the first ones make buffers
    return mixed / full
