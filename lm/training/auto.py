"""`trainer.precision auto` and `model.compile auto`: what trains a recipe's network faster on this machine, measured.

Shapes: B sequences, T tokens.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lm.backprop import Gradients
from lm.data import chunks
from lm.data.module import TokenData
from lm.generation.packed import has_instructions
from lm.training.by_hand import Compiled, StepByHand, compile_pass
from lm.training.callbacks.process import keep_memory
from lm.training.compute import compiler_missing
from lm.training.division import Division
from lm.training.language_model import LanguageModel
from lm.training.manual import ManualLanguageModel
from lm.training.parts import make_net

AUTO, FULL, MIXED = "auto", "32-true", "bf16-mixed"
TOKENS = 1024  # of the batch that is tried in other precisions; other numbers must be worth it at any size
SECONDS = 1.0
CLEARLY = 0.9  # of the time: less would not be worth other numbers, or a minute of compiling


def choose_precision(module: LanguageModel, data: TokenData, device: torch.device) -> tuple[str, str]:
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
        found = gradients(module, data, device, compiled=False)
        batch = batch_of(data, device, max(1, TOKENS // data.block_size))
        full, mixed = (partial(found, context(precision, device), *batch) for precision in (FULL, MIXED))
        ratio = ratio_of_times(full, mixed, device)
    if ratio < CLEARLY:
        return MIXED, f"a step takes {ratio:.2f} of the time of {FULL}; products are rounded to 8 bits"
    return FULL, f"{MIXED} takes {ratio:.2f} of its time"


def choose_compile(module: LanguageModel, data: TokenData, device: torch.device, precision: str) -> tuple[bool, str]:
    """Return whether compiled gradients are clearly faster, and the reason in words.

    They are those of the recipe's own network, on one of its batches. No random state changes.

    Args:
        module: Makes the network, and says whether gradients are by hand.
        data: Set up.
        device: Where training will compute.
        precision: The Trainer's.
    """
    if not module.compiles:
        return False, f"{type(module).__name__} is not compiled"
    if missing := compiler_missing(device):
        return False, f"{missing} is missing here"
    if module.activation_checkpointing and isinstance(module, ManualLanguageModel):
        return False, "one graph would keep what model.activation_checkpointing computes again"
    with isolate_rng():
        batch = batch_of(data, device, data.batch_size)
        plain, compiled = (
            partial(gradients(module, data, device, compiled=which), context(precision, device), *batch)
            for which in (False, True)
        )
        try:
            ratio = ratio_of_times(plain, compiled, device)
        except RuntimeError as error:  # the compiler's errors are of this kind
            return False, f"it does not compile here ({type(error).__name__})"
    return ratio < CLEARLY, f"compiled, a step takes {ratio:.2f} of the time"


def context(precision: str, device: torch.device) -> Any:
    """Return what a forward pass runs in: a function that makes a context."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return nullcontext if mixed is None else partial(torch.autocast, device.type, mixed)


def batch_of(data: TokenData, device: torch.device, most: int) -> list[Tensor]:
    """Return a batch of training examples, at most so many and at most a step's."""
    return [one.to(device) for one in chunks.rows(data.training_examples()(0, min(data.batch_size, most)))]


def gradients(module: LanguageModel, data: TokenData, device: torch.device, *, compiled: bool) -> Callable[..., Any]:
    """Return what computes a new network's gradients, of a context, tokens and targets."""
    net = make_net(module.make_net, data.vocab_size, data.block_size).to(device)
    if isinstance(module, ManualLanguageModel):
        return gradients_by_hand(net, compile_pass() if compiled else None)
    if compiled:
        net.compile()
    return gradients_of(module, net)


def gradients_of(module: LanguageModel, net: nn.Module) -> Callable[..., Any]:
    """Return what computes gradients by autograd."""

    def gradients(context: Any, tokens: Tensor, targets: Tensor) -> None:
        net.zero_grad()
        with context():
            loss = module.objective(net(tokens), targets, Division())
        loss.backward()

    return gradients


def gradients_by_hand(net: nn.Module, compiled: Compiled | None) -> Callable[..., Any]:
    """Return what computes gradients by the rules."""
    step = StepByHand(net, list(net.parameters()), Gradients(), compiled=compiled)

    @torch.no_grad()
    def gradients(context: Any, tokens: Tensor, targets: Tensor) -> None:
        step.begin()
        with context():
            step.add(tokens, targets, last=True)
        step.finish()

    return gradients


def ratio_of_times(one: Callable[[], Any], other: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of the other, divided by that of the one; both take turns for a second."""
    if device.type == "cpu":
        keep_memory()  # as in training
    times: tuple[list[float], list[float]] = ([], [])
    for run in (one, other):  # the first ones compile, and make buffers
        run()
    end = time.perf_counter() + SECONDS
    while not times[1] or time.perf_counter() < end:
        for run, found in zip((one, other), times, strict=True):
            began = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            found.append(time.perf_counter() - began)
    return median(times[1]) / median(times[0])
