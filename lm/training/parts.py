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

Maker = Callable[[Iterable[Any]], Any]
MANY = 64  # layers above which a network's size is extrapolated from that of two and three


def make_net(
    make: Callable[..., Any],
    vocab_size: int,
    block_size: int,
    *,
    counted: bool = False,
    optimizer: Maker | None = None,
    **settings: Any,
) -> nn.Module:
    """Return a network; `settings` override the recipe's.

    Args:
        make: The network's class, with the recipe's settings.
        vocab_size: Number of symbols.
        block_size: Longest context.
        counted: Whether its tensors have no values, so that any network fits.
        optimizer: Makes the optimizer that will train it in this machine's memory; None if none will.
        settings: Of the network.

    Raises:
        UserError: Its settings do not go together, or its class is no network for tokens.
    """
    try:
        if not counted:
            _check_memory(make, vocab_size, block_size, optimizer=optimizer, **settings)
        net: nn.Module = make(vocab_size, block_size, **settings)
    except ValueError as error:
        raise UserError(f"model.net: {error}") from error
    except (TypeError, AssertionError) as error:
        raise UserError(f"model.net: it cannot be made of vocab_size and block_size: {error}: see lm.models") from error
    if not all(isinstance(getattr(net, name, None), int) for name in ("vocab_size", "block_size")):
        raise UserError(
            f"model.net {type(net).__name__} is no network for tokens, with vocab_size and block_size: see lm.models"
        )
    return net


def _check_memory(make: Callable[..., Any], *sizes: int, optimizer: Maker | None, **settings: Any) -> None:
    """Check, by making a network on the meta device first, that there is memory for it and for its training.

    Raises:
        UserError: There is not.
    """
    layers = settings.get("n_layer", getattr(make, "keywords", {}).get("n_layer", 0))
    needed, count, kind = 0, 0, ""
    with isolate_rng(include_cuda=False), suppress(Exception), torch.device("meta"):  # other errors show later
        if isinstance(layers, int) and layers > MANY:  # making it would take as long as all that follows
            few = [_sizes(make(*sizes, **settings | {"n_layer": n}), optimizer) for n in (2, 3)]
            needed, count = (a + (layers - 2) * (b - a) for a, b in zip(*(one[:2] for one in few), strict=True))
            kind = few[0][2]
        else:
            needed, count, kind = _sizes(make(*sizes, **settings), optimizer)
    if needed > (free := compute.memory()[1]):
        what = "" if optimizer is None else ", their gradients, the optimizer's state and the copy that is saved"
        raise UserError(
            f"model.net {kind}: {count:,} parameters{what} take {needed / 1e9:,.3g} GB, {free / 1e9:,.3g} GB of memory "
            "are free here: make it smaller, by n_embd or n_layer; lm plan says what a recipe needs"
        )


def _sizes(net: nn.Module, optimizer: Maker | None) -> tuple[int, int, str]:
    """Return the bytes that a network on the meta device needs, its number of parameters and its name.

    On a CPU, a checkpoint is written from a copy of weights and optimizer state, while training goes on.
    """
    parameters = list(net.parameters())
    count, kind = sum(p.numel() for p in parameters), type(net).__name__
    kept = sum(t.nbytes for t in (*parameters, *net.buffers()))
    if optimizer is None:
        return kept, count, kind
    made = optimizer(parameter_groups(net))
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    made.step()
    states = [t for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    kept += sum(t.nbytes for t in states)
    return 2 * kept + sum(p.nbytes for p in parameters), count, kind


def make_optimizer(make: Maker, *nets: nn.Module) -> Optimizer:
    """Return the optimizer of networks' parameters.

    Raises:
        UserError: Its settings do not go together, or its class fits no network here.
    """
    try:
        optimizer = make([group for net in nets for group in parameter_groups(net)])
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: {error}") from error
    if isinstance(optimizer, torch.optim.SparseAdam | torch.optim.LBFGS) or not isinstance(optimizer, Optimizer):
        reason = "it is for sparse gradients" if isinstance(optimizer, torch.optim.SparseAdam) else "it is no optimizer"
        reason = "it computes the loss several times a step" if isinstance(optimizer, torch.optim.LBFGS) else reason
        raise UserError(f"model.optimizer {type(optimizer).__name__}: {reason}: use torch.optim.AdamW")
    return optimizer
