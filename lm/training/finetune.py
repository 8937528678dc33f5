"""Fine-tuning: a new run that begins with another one's weights."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lm.checkpoints import imports, schema
from lm.errors import UserError, setting
from lm.tokenizers import BytePairTokenizer, Tokenizer, from_state, identity
from lm.training import compatibility
from lm.training.parts import make_net

Ids = dict[int, int]
"""Of tokens that two tokenizers have in common: a checkpoint's, and the data's."""
OF_TOKENS = ("document_end", "start_token")
"""Settings of networks that are a token's id."""


def take_weights(
    net: Any, make: Callable[..., Any], tokenizer: Tokenizer, path: Path, config: dict[str, Any] | None = None
) -> str:
    """Copy a checkpoint's weights into a network; its optimizer and step stay behind.

    The vocabulary may be another one: what the network has of each token goes over by symbol, and stays as it was
    initialised for tokens that the checkpoint lacks. The context may be shorter than the checkpoint's: a table of
    learned positions is cropped to its first rows. It may be longer where the network has no such table, as with rotary
    positions.

    Args:
        net: Takes the weights; initialised.
        make: Made it of its vocab_size and block_size.
        tokenizer: The data's. It gets the checkpoint's chat template where it has none, if their ids are the same.
        path: The checkpoint, or a folder of Hugging Face's transformers.
        config: The recipe; None to compare shapes alone.

    Returns:
        Where the weights are from, for the run's first line.

    Raises:
        UserError: The checkpoint cannot be read, or is of another network or a reward model, or its vocabulary has too
            little in common.
        CheckError: Its weights are not finite.
    """
    saved = imports.load(path, "init_from")
    if saved.scores:
        raise UserError(
            f"{setting('init_from')} {path}: it is a reward model, which writes no text: begin with the run that it "
            f"began with, or go on with it by {setting('ckpt_path')} and a larger trainer.max_steps"
        )
    there, said, ids = from_state(saved.tokenizer), "", {}
    if identity(there.state()) == identity(tokenizer.state()):
        tokenizer.chat = tokenizer.chat or there.chat
    else:
        ids = common_ids(there, tokenizer, f"{setting('init_from')} {path}")
        taken, new, left_out = len(ids), tokenizer.n_vocab - len(ids), there.n_vocab - len(ids)
        said = f" (vocabulary: {taken:,} tokens taken over, {new:,} new, {left_out:,} left out)"
    if config and saved.config:
        compatibility.check_network(f"{setting('init_from')} {path}", _with_ids(saved.config, ids, net), config)
    weights, built = saved.weights, net.state_dict()
    compatibility.check_finite(str(path), weights)
    if ids:
        for key, dims in _vocabulary_dims(net, make).items():
            if key in weights and _fit(weights[key], built[key], dims):
                weights[key] = _placed(weights[key], built[key], dims, ids)
    said += _crop(net, weights, saved.block_size)
    for key in (*weights, *built):
        shapes = [str(tuple(tensors[key].shape)) if key in tensors else "missing" for tensors in (weights, built)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{setting('init_from')} {path} is of another shape: net.{key} is {shapes[0]} there and {shapes[1]} in "
                f"this configuration: use the network and data.block_size {saved.block_size} that it was trained with"
            )
    net.load_state_dict(weights)
    return f", from the weights of {path}, step {saved.step}{said}"


def common_ids(there: Tokenizer, here: Tokenizer, path: str) -> Ids:
    """Return the ids of the tokens that two tokenizers have in common.

    Args:
        there: A checkpoint's.
        here: The data's.
        path: The checkpoint, for the message.

    Raises:
        UserError: Less than half of the smaller vocabulary is in common, or one has word pieces and the other single
            symbols, which mean something else even where they are written the same.
    """
    places = {token: i for i, token in enumerate(_tokens(here)) if token}
    ids = {i: places[token] for i, token in enumerate(_tokens(there)) if token in places}
    kinds = {isinstance(one, BytePairTokenizer) for one in (there, here)}
    if len(kinds) > 1 or 2 * len(ids) < min(there.n_vocab, here.n_vocab):
        why = "" if len(kinds) > 1 else f", {len(ids):,} in common, which is too few"
        raise UserError(
            f"{path} has another vocabulary: {_name(there)} there, {_name(here)} here{why}: use a data.tokenizer of "
            "the same kind (TextData keeps the checkpoint's by data.tokenizer inherit)"
        )
    return ids


def _tokens(tokenizer: Tokenizer) -> list[Any]:
    """Return what each id stands for: bytes, or the name of a special token; nothing where it is unused."""
    found: list[Any] = tokenizer.token_bytes()
    end = {} if tokenizer.eot is None or found[tokenizer.eot] else {"the end of a text": tokenizer.eot}
    for name, i in [*tokenizer.special_ids.items(), *end.items()]:  # whatever that is called
        found[i] = name
    return found


def _with_ids(config: dict[str, Any], ids: Ids, net: Any) -> dict[str, Any]:
    """Return a checkpoint's recipe with the data's ids of tokens, and with the end of documents where that is new.

    A network computes the same with and without an end of documents that its vocabulary lacks.
    """
    config = deepcopy(config)
    settings = schema.net_of(config).get("init_args") or {}
    settings.update({name: ids.get(settings[name], settings[name]) for name in OF_TOKENS if name in settings})
    end = getattr(net, "document_end", None)
    if ids and settings.get("document_end") is None and end is not None and end not in ids.values():
        settings["document_end"] = end
    return config


def _vocabulary_dims(net: Any, make: Callable[..., Any]) -> dict[str, list[int]]:
    """Return which dimensions of a network's tensors are its vocabulary: those that grow with it."""
    with isolate_rng(include_cuda=False), torch.device("meta"):
        larger = make_net(make, net.vocab_size + 1, net.block_size, counted=True).state_dict()
    shapes = {key: zip(value.shape, larger[key].shape, strict=True) for key, value in net.state_dict().items()}
    return {key: [i for i, (one, other) in enumerate(sizes) if one != other] for key, sizes in shapes.items()}


def _fit(there: Tensor, here: Tensor, dims: list[int]) -> bool:
    """Return whether two tensors differ in the vocabulary alone."""
    sizes = [[n for i, n in enumerate(value.shape) if i not in dims] for value in (there, here)]
    return bool(dims) and there.ndim == here.ndim and sizes[0] == sizes[1]


def _placed(there: Tensor, here: Tensor, dims: list[int], ids: Ids) -> Tensor:
    """Return a network's tensor with what a checkpoint's has for the tokens in common in its place."""
    if not dims:
        return there.to(here)
    old, new = (torch.tensor(list(one), device=here.device) for one in (ids.keys(), ids.values()))
    part = there.index_select(dims[0], old.to(there.device))
    return here.index_copy(dims[0], new, _placed(part, here.index_select(dims[0], new), dims[1:], ids))


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
