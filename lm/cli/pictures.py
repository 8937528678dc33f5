"""Pictures of a network and its first batch, as PNG: for `lm inspect --figures` and for `lm report`."""

from argparse import ArgumentError
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from PIL import Image
from torch import nn

from lm.checkpoints import checkpoint
from lm.checkpoints.restore import deny_what_runs_code, load_network
from lm.course import figures
from lm.data.module import TokenData
from lm.errors import UserError
from lm.training import audit

TOKENS = 1024  # of the first batch: all of a small recipe's


def draw(net: nn.Module, data: TokenData, make_optimizer: Callable[..., Any] | None = None) -> dict[str, bytes]:
    """Return the pictures that there are of a network and its first batch, by name.

    Args:
        net: The network, with the weights to be shown.
        data: Is set up.
        make_optimizer: Returns the recipe's optimizer, of which a first step is shown; None for none.
    """
    tokens, targets = audit.cut(*data.first_batch(), TOKENS)
    decode = data.text_tokenizer.decode
    symbols = [decode([i]).replace(" ", "·").replace("\n", "\\n") for i in range(data.vocab_size)]
    found = {}
    for name, pixels in figures.draw(net.train(), tokens, targets, symbols, make_optimizer).items():
        png = BytesIO()
        Image.fromarray(pixels).save(png, format="PNG")
        found[name] = png.getvalue()
    return found


def of_checkpoint(path: Path) -> dict[str, bytes]:
    """Return the pictures of a checkpoint's network and of the first batch that it was trained on.

    Raises:
        UserError: The checkpoint cannot be read, or does not say what it was trained on, or that is not to be had.
        CheckError: Its weights are not finite.
    """
    fitted = load_network(path)
    recipe = checkpoint.peek(path).config
    if not recipe:
        raise UserError(f"checkpoint {path}: it does not say what it was trained on")
    data = data_of(recipe)
    data.tokenizer = fitted.tokenizer  # ids mean what they meant in training
    data.setup("fit")
    return draw(fitted.net, data)


def data_of(recipe: dict[str, Any]) -> TokenData:
    """Return the data that a recipe names, not yet set up.

    Raises:
        UserError: They cannot be made here.
    """
    deny_what_runs_code()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TokenData, "data")
    said = recipe["data"]
    settings = {**(said.get("init_args") or {}), "seed": recipe.get("seed_everything", 0)}
    try:
        parsed = parser.parse_object({"data": {"class_path": said["class_path"], "init_args": settings}})
        data: TokenData = parser.instantiate(parsed).data
    except (ArgumentError, TypeError, ValueError, ImportError, AttributeError) as error:
        raise UserError(f"data {said['class_path']}: {str(error).splitlines()[-1].strip()[:200]}") from error
    return data
