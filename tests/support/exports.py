"""Checkpoints of random networks, to be exported."""

from pathlib import Path
from typing import Any

import torch

from lm.checkpoints import checkpoint
from lm.checkpoints.huggingface import export_huggingface
from lm.checkpoints.imports import import_any
from lm.checkpoints.restore import Fitted
from lm.checkpoints.schema import NET, Saved
from lm.models import GPT
from lm.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

T = 24
SYMBOLS = "abcdefghij\n"
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32}
TODAY: dict[str, Any] = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu"}


def written(path: Path, settings: dict[str, Any], tokenizer: Tokenizer | None = None, dtype: Any = None) -> Fitted:
    """Write the checkpoint of a network none of whose weights is zero or one, in float64 by default; return both."""
    tokenizer = tokenizer or CharTokenizer(SYMBOLS)
    torch.manual_seed(3)
    net = GPT(tokenizer.n_vocab, T, **settings).to(dtype or torch.float64).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    recipe = {
        "name": "random",
        "trainer": {"precision": "64-true"},
        "model": {
            "class_path": "lm.training.LanguageModel",
            "init_args": {"net": {"class_path": "lm.models.GPT", "init_args": settings}},
        },
        "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "text.txt", "block_size": T}},
    }
    saved = Saved(
        step=3,
        state={NET + name: value for name, value in net.state_dict().items()},
        config=recipe,
        tokenizer=tokenizer.state(),
        vocab_size=tokenizer.n_vocab,
        block_size=T,
        validation={"loss": 1.25, "perplexity": 3.49, "bits_per_byte": 1.8, "step": 3},
    )
    checkpoint.write(saved.imported(), path)
    return Fitted(net, tokenizer, 3, {})


def imported(path: Path) -> Path:
    """Write the checkpoint of a small LLaMA as it comes from another program; return its path."""
    folder = path.with_suffix(".hf")
    written(path.with_suffix(".made"), {**SMALL, **TODAY, "bias": False}, ByteTokenizer(), torch.float32)
    export_huggingface(path.with_suffix(".made"), folder)
    return import_any(folder, path)


def exact(path: Path) -> torch.nn.Module:
    """Return a checkpoint's network in the precision that it was saved in."""
    saved = Saved.of(checkpoint.load(path))
    net = GPT(saved.vocab_size, saved.block_size, **saved.net["init_args"]).to(saved.weights["wte.weight"].dtype)
    net.load_state_dict(saved.weights)
    return net.eval()
