"""Whether a checkpoint fits a recipe: its network, its vocabulary, its optimizer."""

import functools
import platform
from importlib import metadata
from typing import Any

from torch import Tensor

from lm import __version__
from lm.checkpoints import schema
from lm.checkpoints.schema import Saved
from lm.data.chunks import IGNORED, rows
from lm.errors import CheckError, UserError, setting
from lm.tokenizers import Tokenizer, identity
from lm.training import recipes

KEPT = {"reference": "reference", "critic": "value network"}
"""With which names begin, in a checkpoint, that are not the network's: a policy's reference, or DPO's log-probabilities
of it; and its value network."""
FREE = {"dropout"}
"""Settings that do not change what any network computes from its weights."""
INITIAL = {"init_std", "base_width", "head_scale", "momentum", "key_dropout"}
"""The same, for lm.models' networks alone: initial weights, which loaded ones replace, and what only training does."""


def check(
    path: Any,
    checkpoint: dict[str, Any],
    built_state: dict[str, Tensor],
    config: dict[str, Any] | None,
    tokenizer: Tokenizer,
    *,
    optimizer: bool,
) -> Saved:
    """Check that a checkpoint can be used with a recipe and its data; return what it holds.

    Args:
        path: Its file, for the message.
        checkpoint: Its contents.
        built_state: The state of the module that is to take it over.
        config: The recipe; None to compare shapes alone.
        tokenizer: The data's.
        optimizer: Whether the optimizer state is needed too.

    Raises:
        UserError: Something differs; the message says what it is in the checkpoint and in the recipe.
        CheckError: Training is to go on from weights that are not finite.
    """
    outline = schema.FITTED if config is None else schema.RESUMED if optimizer else schema.USED
    if optimizer and checkpoint.get("optimizer_states") == []:
        raise UserError(
            f"{path} has no optimizer's state, as it was imported: begin a new run with {setting('init_from')} {path}"
        )
    try:
        there = Saved.of(checkpoint, outline)
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}: it is damaged, or another program's: use another one") from error
    if identity(there.tokenizer) != identity(tokenizer.state()):
        raise UserError(
            f"{path} has another tokenizer than data.corpus and data.tokenizer give: use its data, "
            "prepared with its tokenizer"
        )
    if config and there.config:  # shapes do not show everything, such as the number of heads
        check_network(str(path), there.config, config)
    _check_state(str(path), there.state, built_state, optimizer=optimizer)
    if optimizer:
        check_finite(str(path), there.state)
    if optimizer and config and there.config:
        kinds = [schema.optimizer_of(one) for one in (there.config, config)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{path} has the state of {kinds[0]}, the recipe says {kinds[1]}: use the same optimizer")
    return there


def _check_state(path: str, there: dict[str, Tensor], built_state: dict[str, Tensor], *, optimizer: bool) -> None:
    """Compare the names and shapes of two states; where training goes on, what a policy keeps must be there, too."""
    saved = {key: tuple(value.shape) for key, value in there.items()}
    built = {key: tuple(value.shape) for key, value in built_state.items()}
    for key in (*saved, *built):
        one, other = saved.get(key, "missing"), built.get(key, "missing")
        if one != other and ((key in saved and key in built) or key.startswith(schema.NET)):
            raise _another(path, key, one, other)
        kind = next((kind for start, kind in KEPT.items() if key.startswith(start)), None)
        if optimizer and one != other and kind:
            has = "no" if one == "missing" else "a" if other == "missing" else "another"
            needs = {"no": "one", "a": "none", "another": "its own"}[has]
            raise UserError(
                f"{path} has {has} {kind}, and the recipe's model needs {needs}: begin a run with "
                f"{setting('init_from')} {path}, or keep data, model.kl and model.value"
            )


def check_finite(path: str, weights: dict[str, Tensor]) -> None:
    """Raise a CheckError where weights have NaN or infinity; a sharded checkpoint's are not loaded yet, and skipped."""
    there = {name.removeprefix(schema.NET): value for name, value in weights.items() if not value.is_meta}
    if name := schema.not_finite(there):
        raise CheckError(f"checkpoint {path}: {name} is not finite, training had diverged: use an earlier checkpoint")


def check_data(net: Any, data: Any) -> None:
    """Refuse data that does not fit a network.

    Raises:
        UserError: The network's attention restarts after a token other than the data's end of text, or does not where
            documents of a sequence must not see each other; or the network reads a source and writes what follows, but
            the data has targets in the source, where its logits mean nothing.
    """
    tokenizer = data.text_tokenizer
    end = getattr(net, "document_end", None)
    if end is not None and end != tokenizer.eot:
        raise UserError(
            f"model.net.init_args.document_end is {end}, the data's end-of-text token is {tokenizer.eot}: say that one"
        )
    if end is None and getattr(data, "packed", False):
        raise UserError(
            "data.packed: conversations in one sequence would see each other: say model.net.init_args.document_end "
            f"{tokenizer.eot}, or data.packed false"
        )
    start = getattr(net, "start_token", None)
    if start is not None:
        tokens, targets = rows(data.training_examples()(0, 16))  # (B, T), (B, T) or (B,)
        targets = targets if targets.ndim == 2 else targets.unsqueeze(1)
        if targets.shape[1] < tokens.shape[1] or ((targets != IGNORED) & ((tokens == start).cumsum(1) == 0)).any():
            sign = tokenizer.decode([start])
            raise UserError(
                f"model.net {type(net).__name__} writes what follows token {start}, {sign!r}, but "
                f"{type(data).__name__} has targets before it, which would mean nothing: use "
                "problems with answers, lm.data.ReverseData say, "
                "and as start_token the id of the sign between them"
            )


def check_network(path: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise a UserError where two recipes' networks compute different functions from the same weights."""
    net = schema.net_of(here)
    ours = net["class_path"].startswith("lm.models.")
    for name, one, other in recipes.differences(schema.net_of(there), net):
        if name.rpartition(".")[2] in FREE or (ours and name in INITIAL):
            continue
        raise _another(path, name, recipes.said(one), recipes.said(other))


def _another(path: str, name: str, there: Any, here: Any) -> UserError:
    return UserError(
        f"{path} is of another architecture: {name} is {there} there and {here} in this configuration: use the "
        "configuration that it was trained with"
    )


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("torch", "lightning", "torchmetrics", "numpy", "tiktoken")
    ours = {"lm": __version__, "python": platform.python_version()}
    return ours | {name: _version(name) for name in names}


@functools.cache
def _version(package: str) -> str:
    return metadata.version(package)  # cached: it reads the package's files, and every save needs it
