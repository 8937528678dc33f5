"""Whether a checkpoint goes with a recipe: its network, its vocabulary, its optimizer."""

import platform
from importlib import metadata
from typing import Any

from torch import Tensor

from lm import __version__
from lm.data.chunks import IGNORED
from lm.data.tokenizers import Tokenizer, identity
from lm.errors import UserError


def check(
    path: Any,
    checkpoint: dict[str, Any],
    built_state: dict[str, Tensor],
    config: dict[str, Any] | None,
    tokenizer: Tokenizer,
    *,
    optimizer: bool,
) -> None:
    """Check that a checkpoint can be gone on with.

    Args:
        path: Its file, for the message.
        checkpoint: Its contents.
        built_state: The state of the module that is to take it over.
        config: The recipe; None where there is none, then shapes alone are compared.
        tokenizer: The data's.
        optimizer: Whether the optimizer's state is wanted too.

    Raises:
        UserError: Something is of another kind; says what it is there and here.
    """
    if identity(checkpoint["lm"]["tokenizer"]) != identity(tokenizer.state()):
        raise UserError(
            f"{path} has another tokenizer than data.corpus and data.tokenizer give: use its data, "
            "prepared with its tokenizer"
        )
    saved: dict[str, Any] = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
    built: dict[str, Any] = {key: tuple(value.shape) for key, value in built_state.items()}
    if config is not None:  # not all that matters shows in the shapes: the number of heads does not
        saved = _flat(checkpoint["lm"]["config"]) | saved
        built = _flat(config) | built
    for key in (*saved, *built):
        there, here = saved.get(key, "missing"), built.get(key, "missing")
        if there != here and ((key in saved and key in built) or key.startswith("net.")):
            raise UserError(
                f"{path} is of another architecture: {key} is {there} there and {here} in this configuration: use "
                "the configuration that it was trained with"
            )
    if optimizer and checkpoint.get("optimizer_states") == []:
        raise UserError(f"{path} has no optimizer's state, as it was imported: begin a new run with --init_from {path}")
    there, here = (one and _optimizer(one) for one in (checkpoint["lm"]["config"], config))
    if optimizer and there and here and there != here:
        raise UserError(f"{path} has the state of {there}, the recipe says {here}: use the same optimizer")


def check_data(net: Any, data: Any) -> None:
    """Refuse data that a network makes nothing of.

    Raises:
        UserError: Its attention starts anew after another token than the end of text, or it reads a source and writes
            what follows, and the data has targets in the source, where its logits mean nothing.
    """
    tokenizer = data.text_tokenizer
    end = getattr(net, "document_end", None)
    if end is not None and end != tokenizer.eot:
        raise UserError(
            f"model.net.init_args.document_end is {end}, the data's end-of-text token is {tokenizer.eot}: say that one"
        )
    start = getattr(net, "start_token", None)
    if start is not None:
        tokens, targets = data.training_examples()(0, 16)  # (B, T), (B, T) or (B,)
        targets = targets if targets.ndim == 2 else targets.unsqueeze(1)
        if targets.shape[1] < tokens.shape[1] or ((targets != IGNORED) & ((tokens == start).cumsum(1) == 0)).any():
            sign = tokenizer.decode([start])
            raise UserError(
                f"model.net {type(net).__name__} writes what follows token {start}, {sign!r}, but "
                f"{type(data).__name__} has targets before it, which would mean nothing: use "
                "problems with answers, lm.data.ReverseData say, "
                "and as start_token the id of the sign between them"
            )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the network's function: its class and arguments, dropout aside."""
    net = config["model"]["init_args"]["net"]
    arguments = {k: v for k, v in (net.get("init_args") or {}).items() if k != "dropout"}
    return {"class_path": net["class_path"]} | arguments


def _optimizer(config: dict[str, Any]) -> str:
    chosen = config["model"]["init_args"].get("optimizer")
    return chosen["class_path"] if chosen else "torch.optim.AdamW"


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("torch", "lightning", "torchmetrics", "numpy", "tiktoken")
    ours = {"lm": __version__, "python": platform.python_version()}
    return ours | {name: metadata.version(name) for name in names}
