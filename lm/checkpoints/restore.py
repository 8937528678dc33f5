"""From a checkpoint file back to a network and its tokenizer: neither config nor corpus is needed."""

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import nn
from torch.overrides import TorchFunctionMode

from lm.checkpoints import checkpoint, schema
from lm.errors import CheckError, UserError
from lm.tokenizers import Tokenizer, from_state


class Fitted(NamedTuple):
    """What a checkpoint holds, ready for use."""

    net: nn.Module
    """The network, in eval mode."""
    tokenizer: Tokenizer
    step: int
    """Optimizer steps it was trained for."""
    data: dict[str, Any]
    """What it was trained on, class_path and init_args; empty where that is not known."""


def load_network(
    path: Path,
    device: torch.device | str = "cpu",
    change: Callable[[nn.Module], None] | None = None,
    *,
    writes: bool | None = None,
) -> Fitted:
    """Return the network and tokenizer of a checkpoint.

    The file is read as tensors and plain values only; the class it names is imported and must be an nn.Module.

    Args:
        path: The checkpoint.
        device: Where the network is to be.
        change: Changes the network that the recipe names into the one that was trained: gives a reward model its head.
        writes: Whether it is to write text, True, or to say a text's class, False; None where both will do.

    Raises:
        UserError: The file is missing, damaged or not one of ours, or its network is of the other kind.
        CheckError: Its weights are not finite.
    """
    loaded = checkpoint.load(path)
    with checkpoint.of_lm(path):
        saved = schema.Saved.of(loaded)
        net = build(saved.net, saved.vocab_size, saved.block_size)
        weights = saved.weights
        scores = saved.scores
        if scores != (change is not None):
            what = "a reward model, which writes no text" if scores else "no reward model"
            raise UserError(f"checkpoint {path}: it is {what}: name another one")
        if writes not in (None, saved.writes):
            what = "writes text: lm sample continues it" if saved.writes else "says a text's class: use lm classify"
            raise UserError(f"checkpoint {path}: its network {what}")
        if change is not None:
            change(net)
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"checkpoint {path}: its weights do not fit {type(net).__name__}: {error}") from error
        fitted = Fitted(net.to(device).eval(), from_state(saved.tokenizer), saved.step, saved.data)
    if name := schema.not_finite(weights):
        raise CheckError(f"checkpoint {path}: {name} is not finite, training had diverged: use an earlier checkpoint")
    return fitted


def deny_what_runs_code() -> None:
    """Forbid a class_path, of a recipe or a checkpoint, that runs other code, such as os.system; see jsonargparse."""
    set_parsing_settings(import_path_denylist=["ctypes"])


def build(config: dict[str, Any], vocab_size: int, block_size: int) -> nn.Module:
    """Return a network from its class_path and init_args; its weights are not initialised, as they are loaded later."""
    deny_what_runs_code()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    sizes = {"vocab_size": vocab_size, "block_size": block_size}
    config = {"class_path": config["class_path"], "init_args": {**(config.get("init_args") or {}), **sizes}}
    try:
        with without_initialisation():
            net: nn.Module = parser.instantiate(parser.parse_object({"net": config})).net
    except (ArgumentError, TypeError, ValueError, ImportError, AttributeError) as error:
        denied = "is not allowed" in str(error)
        advice = "it could run any code" if denied else "is its module to be imported here?"
        raise UserError(
            f"the network {config['class_path']} cannot be made: {advice} ({str(error).splitlines()[-1].strip()[:200]})"
        ) from error
    return net


class without_initialisation(TorchFunctionMode):  # noqa: N801 - a context manager
    """Leaves the weights of networks made inside it uninitialised: they are loaded, or drawn elsewhere."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip all functions of torch.nn.init; their first argument is the tensor to fill."""
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
