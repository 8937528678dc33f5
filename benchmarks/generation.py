"""How fast text is made: by `generate` in each dtype, by the engine, and by transformers where it is installed.

    python benchmarks/generation.py [--shape 10M|124M] [--texts 1 16] [--tokens 240] [--rounds 3] [--threads 2]

Weights are random, all texts begin with one token and have as many tokens, sampled at temperature 1. All take turns in
one process, so a ratio is a figure even where the machine is shared. The engine continues requests of 16 to 256 tokens;
below it, `generate` makes as many texts of their mean length.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lm.generation import Sampler, generate
from lm.generation.engine import Engine, Request
from lm.generation.narrow import narrowed
from lm.models import GPT
from lm.tokenizers import ByteTokenizer

SHAPES: dict[str, dict[str, int]] = {
    "10M": {"vocab_size": 65, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384},
    "124M": {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
}


def network(shape: str) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(0)
    return GPT(**SHAPES[shape], bias=shape != "10M").eval()


def ours(net: nn.Module, texts: int, tokens: int) -> Callable[[], int]:
    """Return what makes texts by `generate`, and says how many tokens."""

    def run() -> int:
        prompt = torch.zeros(texts, 1, dtype=torch.int64)
        made = generate(net, prompt, sampler=Sampler(), generator=torch.Generator().manual_seed(1))
        for _ in range(tokens):
            next(made)
        return texts * tokens

    return run


def theirs(shape: str, texts: int, tokens: int) -> Callable[[], int]:
    """Return the same by transformers' generate."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = SHAPES[shape]
    config = GPT2Config(
        vocab_size=sizes["vocab_size"], n_positions=sizes["block_size"], n_embd=sizes["n_embd"],
        n_layer=sizes["n_layer"], n_head=sizes["n_head"], bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()

    def run() -> int:
        prompt = torch.zeros(texts, 1, dtype=torch.int64)
        mask = torch.ones_like(prompt)
        with torch.inference_mode():
            out = model.generate(prompt, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=tokens)
        assert out.shape == (texts, 1 + tokens)
        return texts * tokens

    return run


def requests(count: int, longest: int) -> list[Request]:
    """Return requests of different lengths."""
    draw = random.Random(1)
    return [Request(prompt=[0], seed=i, max_new_tokens=draw.randint(16, longest)) for i in range(count)]


def engine(net: nn.Module, slots: int, wanted: list[Request]) -> Callable[[], int]:
    """Return what makes the requests' texts by an engine, and says how many tokens."""
    made = Engine(net, ByteTokenizer(), slots=slots)
    return lambda: sum(len(text.tokens) for text in made.run(wanted))


def contestants(shape: str, texts: int, tokens: int) -> dict[str, Callable[[], int]]:
    """Return who takes part, in the order of their turns; bars are against the first."""
    many = f"{texts} text" + "s" * (texts > 1)
    found = {f"generate, float32, {many}": ours(network(shape), texts, tokens)}
    try:
        found[f"transformers, float32, {many}"] = theirs(shape, texts, tokens)
    except ImportError:
        print("transformers is not installed: pip install 'lm[hf]' to see it beside ours")
    for dtype in ("bfloat16", "int8"):
        found[f"generate, {dtype}, {many}"] = ours(narrowed(network(shape), dtype), texts, tokens)  # type: ignore[arg-type]
    wanted = requests(4 * texts, min(256, 2 * tokens))
    total = sum(request.max_new_tokens for request in wanted)
    found[f"engine, {len(wanted)} requests, {many} at once"] = engine(network(shape), texts, wanted)
    found[f"generate, float32, {len(wanted)} texts"] = ours(network(shape), len(wanted), total // len(wanted))
    return found


def main() -> None:
    """Run all in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10M")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"| {options.shape}, tokens a second | here | / float32 |\n| --- | --- | --- |")
    for texts in options.texts:
        runs = contestants(options.shape, texts, options.tokens)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                began = time.monotonic()
                made = run()
                speeds[name].append(made / (time.monotonic() - began))
        base = next(iter(speeds.values()))
        for name, found in speeds.items():
            ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
            print(f"| {name} | {statistics.median(found):,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
