"""Fine-tuning: a new run that begins with another one's weights."""

from pathlib import Path

from torch import nn

from lm.data.tokenizers import Tokenizer, from_state, identity
from lm.errors import UserError
from lm.training import checkpoint


def take_weights(net: nn.Module, tokenizer: Tokenizer, path: Path) -> None:
    """Copy a checkpoint's weights into a network; its optimizer and step stay behind.

    Raises:
        UserError: The checkpoint cannot be read, or is of another vocabulary or of other shapes.
    """
    saved = checkpoint.load(path)
    there = from_state(saved["lm"]["tokenizer"])
    if identity(there.state()) != identity(tokenizer.state()):
        raise UserError(
            f"--init_from {path} has another vocabulary: {_name(there)} there, {_name(tokenizer)} here: use the same "
            "data and tokenizer (TextData keeps the checkpoint's by data.tokenizer inherit)"
        )
    weights = {key.removeprefix("net."): value for key, value in saved["state_dict"].items() if key.startswith("net.")}
    built = net.state_dict()
    for key in (*weights, *built):
        shapes = [str(tuple(tensors[key].shape)) if key in tensors else "missing" for tensors in (weights, built)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--init_from {path} is of another shape: net.{key} is {shapes[0]} there and {shapes[1]} in this "
                "configuration: use the network and data.block_size that it was trained with"
            )
    net.load_state_dict(weights)


def _name(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.state()['kind']} of {tokenizer.n_vocab:,} symbols"
