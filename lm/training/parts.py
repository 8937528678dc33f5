"""Makes the network and the optimizer that a recipe names; a class that cannot be one is refused with the reason."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from lm.errors import UserError
from lm.training import compute
from lm.training.optimizers import parameter_groups


def make_net(
    make: Callable[..., Any], vocab_size: int, block_size: int, *, counted: bool = False, **settings: Any
) -> nn.Module:
    """Return a network; settings take the place of the recipe's.

    Counted, it is for tensors without values, of which any number fits.

    Raises:
        UserError: Its settings do not go together, or its class is no network for tokens.
    """
    try:
        if not counted:
            _check_memory(make, vocab_size, block_size, **settings)
        net = make(vocab_size, block_size, **settings)
    except ValueError as error:
        raise UserError(f"model.net: {error}") from error
    except (TypeError, AssertionError) as error:
        raise UserError(f"model.net: it cannot be made of vocab_size and block_size: {error}: see lm.models") from error
    if not all(isinstance(getattr(net, name, None), int) for name in ("vocab_size", "block_size")):
        raise UserError(
            f"model.net {type(net).__name__} is no network for tokens, with vocab_size and block_size: see lm.models"
        )
    return net


def _check_memory(make: Callable[..., Any], *sizes: int, **settings: Any) -> None:
    """Make a network without values first, whose size tells whether there is memory for it.

    Raises:
        UserError: There is not.
    """
    needed, count, kind = 0, 0, ""
    with isolate_rng(include_cuda=False), suppress(Exception), torch.device("meta"):  # other faults show later
        net = make(*sizes, **settings)
        tensors = [*net.parameters(), *net.buffers()]
        needed, count, kind = sum(t.nbytes for t in tensors), sum(t.numel() for t in tensors), type(net).__name__
    if needed > (free := compute.memory()[1]):
        raise UserError(
            f"model.net {kind}: {count:,} parameters take {needed / 1e9:,.0f} GB, {free / 1e9:,.0f} GB of memory are "
            "free here: make it smaller, by n_embd or n_layer; lm plan says what a recipe needs"
        )


def make_optimizer(make: Callable[[Iterable], Any], net: nn.Module) -> Optimizer:
    """Return the optimizer of a network's parameters.

    Raises:
        UserError: Its settings do not go together, or its class fits no network here.
    """
    try:
        optimizer = make(parameter_groups(net))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: {error}") from error
    if isinstance(optimizer, torch.optim.SparseAdam | torch.optim.LBFGS) or not isinstance(optimizer, Optimizer):
        reason = "it is for sparse gradients" if isinstance(optimizer, torch.optim.SparseAdam) else "it is no optimizer"
        reason = "it computes the loss several times a step" if isinstance(optimizer, torch.optim.LBFGS) else reason
        raise UserError(f"model.optimizer {type(optimizer).__name__}: {reason}: use torch.optim.AdamW")
    return optimizer
