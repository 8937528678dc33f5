"""Fine-tuning: a new run that begins with another one's weights."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lm.checkpoints import imports
from lm.errors import UserError, setting
from lm.tokenizers import Tokenizer, from_state, identity
from lm.training import compatibility


def take_weights(net: nn.Module, tokenizer: Tokenizer, path: Path, config: dict[str, Any] | None = None) -> str:
    """Copy a checkpoint's weights into a network; its optimizer and step stay behind.

    The context may be shorter than the checkpoint's: a table of learned positions is cropped to its first rows. It may
    be longer where the network has no such table, as with rotary positions.

    Args:
        net: Takes the weights.
        tokenizer: The data's.
        path: The checkpoint, or a folder of Hugging Face's transformers.
        config: The recipe; None to compare shapes alone.

    Returns:
        Where the weights are from, for the run's first line.

    Raises:
        UserError: The checkpoint cannot be read, or is of another vocabulary or another network.
        CheckError: Its weights are not finite.
    """
    saved = imports.load(path, "init_from")
    there = from_state(saved.tokenizer)
    if identity(there.state()) != identity(tokenizer.state()):
        raise UserError(
            f"{setting('init_from')} {path} has another vocabulary: {_name(there)} there, {_name(tokenizer)} here: use "
            "the same data and tokenizer (TextData keeps the checkpoint's by data.tokenizer inherit)"
        )
    if config and saved.config:
        compatibility.check_network(f"{setting('init_from')} {path}", saved.config, config)
    weights = saved.weights
    compatibility.check_finite(str(path), weights)
    cropped = _crop(net, weights, saved.block_size)
    built = net.state_dict()
    for key in (*weights, *built):
        shapes = [str(tuple(tensors[key].shape)) if key in tensors else "missing" for tensors in (weights, built)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{setting('init_from')} {path} is of another shape: net.{key} is {shapes[0]} there and {shapes[1]} in "
                f"this configuration: use the network and data.block_size {saved.block_size} that it was trained with"
            )
    net.load_state_dict(weights)
    return f", from the weights of {path}, step {saved.step}{cropped}"


def _crop(net: Any, weights: dict[str, Tensor], there: int) -> str:
    """Crop tables that have a row for each position to the network's context; return a note that says so."""
    here = net.block_size
    tables = {
        f"{name}.weight": len(module.weight) for name, module in net.named_modules() if isinstance(module, nn.Embedding)
    }
    found = [key for key, rows in tables.items() if key in weights and len(weights[key]) == there > here == rows]
    for key in found:
        weights[key] = weights[key][:here]
    return f" ({', '.join(found)}: the first {here} of {there} positions)" if found else ""


def _name(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.state()['kind']} of {tokenizer.n_vocab:,} symbols"
