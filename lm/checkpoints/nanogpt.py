"""nanoGPT's ckpt.pt: a dict of weights and settings, read by torch's weights_only, so that no code in it runs."""

from pathlib import Path

from lm.checkpoints import conversion, layouts
from lm.checkpoints.foreign import Foreign, load_weights_only

COMPILED = "_orig_mod."
"""What torch.compile puts in front of each name."""
GPT2_ROWS = (50257, 50304)
"""Rows of the embedding of a network that reads GPT-2's tokens: as many, or rounded up."""
CHARACTERS = "shakespeare_char"
"""The data set whose symbols are those of tiny Shakespeare."""


class Plain(layouts.GPT2):
    """GPT-2's names, with linear layers as torch has them, (out, in)."""

    def part(self, key: str) -> layouts.Part:
        """Return where a weight is."""
        return layouts.Part(super().part(key).names)

    def has(self, key: str, config: layouts.Json) -> bool:
        """Return whether there is such a bias."""
        return not key.endswith(".bias") or bool(config["bias"])


def read_nanogpt(source: Path) -> tuple[Foreign, str | None]:
    """Return what a ckpt.pt holds, and the name of the tokenizer that it was trained with, None where it does not say.

    Raises:
        ValueError: It says what is wrong.
        OSError, LookupError, TypeError, AttributeError: It is no such file.
    """
    found = load_weights_only(source)
    if not isinstance(found, dict) or not {"model", "model_args"} <= found.keys():
        raise ValueError("it is no ckpt.pt of nanoGPT's, which has model and model_args")
    args = found["model_args"]
    sizes = {key: layouts.value_of(args, key, int) for key in ("n_layer", "n_head", "n_embd")}
    vocab_size, block_size = (layouts.value_of(args, key, int) for key in ("vocab_size", "block_size"))
    bias = layouts.value_of(args, "bias", bool, True)
    dropout = layouts.value_of(args, "dropout", float, 0.0)
    settings = {**sizes, "bias": bias, "dropout": dropout, "feed_forward": "gelu_erf"}
    tensors = {name.removeprefix(COMPILED): value for name, value in found["model"].items()}
    if sizes["n_layer"] > len(tensors):
        raise ValueError(f"model_args says {sizes['n_layer']} layers, and there are {len(tensors)} tensors")
    reader = conversion.Reader(Plain(), tensors, tensors.__getitem__, "model_args")
    ours = conversion.shapes(settings, vocab_size, block_size)
    weights = conversion.incoming(reader, settings | {"tie_weights": True}, ours, {"bias": bias})
    step = found.get("iter_num", 0)
    dataset = (found.get("config") or {}).get("dataset")
    tokenizer = "gpt2" if vocab_size in GPT2_ROWS else "char" if dataset == CHARACTERS else None
    return Foreign(settings, weights, vocab_size, block_size, None, step if type(step) is int else 0), tokenizer
