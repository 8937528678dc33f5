"""Makes the network and the optimizer that a recipe names; a class that cannot be one is refused with the reason."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lm.errors import UserError
from lm.training.optimizers import parameter_groups


def make_net(make: Callable[..., Any], vocab_size: int, block_size: int, **settings: Any) -> nn.Module:
    """Return a network; settings take the place of the recipe's.

    Raises:
        UserError: Its settings do not go together, or its class is no network for tokens.
    """
    try:
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
