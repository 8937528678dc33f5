"""Checkpoints to be served, and `lm serve` in a process of its own."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lm.checkpoints import checkpoint
from lm.checkpoints.schema import NET, Saved
from lm.models import GPT, MLP
from lm.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, to_state
from tests.support.processes import start

BLOCK = 128
TEMPLATE = (
    "{% for message in messages %}{{ '<|endoftext|>' + message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def written(
    path: Path, tokenizer: Tokenizer | None = None, *, chat: str | None = TEMPLATE, block: int = BLOCK, width: int = 32
) -> Path:
    """Write the checkpoint of a random network of bytes, whose likeliest tokens are clearly so; return its path."""
    tokenizer = tokenizer or ByteTokenizer()
    tokenizer.chat = {"chat_template": chat, "eos_token": "<|endoftext|>"} if chat else None
    torch.manual_seed(3)
    settings: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": width, "positions": "rotary"}
    net = GPT(tokenizer.n_vocab, block, **settings, init_std=0.3)
    return _saved(path, net, tokenizer, {"class_path": "lm.models.GPT", "init_args": settings})


def windowed(path: Path) -> Path:
    """Write the checkpoint of a network of another kind, which reads the last few characters of any text."""
    torch.manual_seed(4)
    tokenizer = CharTokenizer("abcdefgh ")
    return _saved(path, MLP(tokenizer.n_vocab, 4), tokenizer, {"class_path": "lm.models.MLP"})


def _saved(path: Path, net: Any, tokenizer: Tokenizer, named: dict[str, Any]) -> Path:
    recipe = {
        "name": "served",
        "trainer": {"precision": "32-true"},
        "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": named}},
        "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "text.txt", "block_size": net.block_size}},
    }
    saved = Saved(
        step=3,
        state={NET + name: value for name, value in net.state_dict().items()},
        config=recipe,
        tokenizer=to_state(tokenizer),
        vocab_size=tokenizer.n_vocab,
        block_size=net.block_size,
        validation={"loss": 1.25, "perplexity": 3.49, "bits_per_byte": 1.8, "step": 3},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(saved.imported(), path)
    return path


@contextmanager
def served(*arguments: object, cwd: Path, **settings: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server on a free port; yield its URL and its process, and end it."""
    process = start("serve", *arguments, "--port", 0, cwd=cwd, **settings)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate()[1])
        yield re.search(r"http://\S+", line)[0], process  # type: ignore[index]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
