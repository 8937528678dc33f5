"""How fast text is made: by `generate` in each dtype, by the engine, and by peers where they are installed.

    python benchmarks/generation.py [--shape 10M|124M] [--texts 1 16] [--tokens 240] [--rounds 3] [--threads 2]

Weights are random, all texts begin with one token and have as many tokens, sampled at temperature 1. All take turns in
one process, so a ratio is a figure even where the machine is shared. The engine continues four times as many requests
of 16 to 256 tokens as it has slots; beside it, `generate` makes as many texts at once, of their mean length.

The last columns are of a step, a token of each text: its time, and which share of the memory's bandwidth reading the
weights takes in that time. Below the table: the time to the first token after a prompt of half a context.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm.checkpoints import checkpoint
from lm.checkpoints.gguf import export_gguf
from lm.checkpoints.schema import NET, Saved
from lm.generation import Sampler, generate
from lm.generation.engine import Engine, Request
from lm.generation.packed import packed
from lm.models import GPT
from lm.tokenizers import ByteTokenizer, CharTokenizer, make

SHAPES: dict[str, dict[str, int]] = {
    "10M": {"vocab_size": 65, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384},
    "124M": {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
}


class Letters(ByteTokenizer):
    """As many ids as a network has; what they stand for costs next to nothing.

    Args:
        n_vocab: How many.
    """

    def __init__(self, n_vocab: int) -> None:
        super().__init__()
        self.n_ids = n_vocab

    def token_bytes(self) -> list[bytes]:
        """Return the letter for each."""
        return [b"a"] * self.n_ids


BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
Speed = Callable[[], float]
"""A turn of a contestant; returns the tokens a second that it made."""


def timed(run: Callable[[], int]) -> Speed:
    """Return a turn of what returns how many tokens it has made."""

    def speed() -> float:
        began = time.monotonic()
        return run() / (time.monotonic() - began)

    return speed


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


def gpt2(shape: str) -> Any:
    """Return the same network as transformers has it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes["vocab_size"], n_positions=sizes["block_size"], n_embd=sizes["n_embd"],
        n_layer=sizes["n_layer"], n_head=sizes["n_head"], bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def theirs(shape: str, texts: int, tokens: int) -> Callable[[], int]:
    """Return the same by transformers' generate."""
    model = gpt2(shape)

    def run() -> int:
        prompt = torch.zeros(texts, 1, dtype=torch.int64)
        mask = torch.ones_like(prompt)
        with torch.inference_mode():
            out = model.generate(prompt, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=tokens)
        assert out.shape == (texts, 1 + tokens)
        return texts * tokens

    return run


def translated(shape: str, dtype: str, texts: int, tokens: int, folder: str) -> Speed:
    """Return the same by ctranslate2, from a network that transformers has made and its own converter has read.

    Each turn is a process of its own, as the library's threads would go on waiting for work on the cores of others.
    """
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SHAPES[shape]["vocab_size"])}, unk_token="t0"))
    ends = {"bos_token": "t0", "eos_token": "t1", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(folder)
    gpt2(shape).save_pretrained(folder)
    converted = f"{folder}/{dtype}"
    TransformersConverter(folder).convert(converted, quantization=dtype)
    sizes = ("--texts", str(texts), "--tokens", str(tokens), "--threads", str(torch.get_num_threads()))
    command = [sys.executable, __file__, "--turn", converted, *sizes]

    return lambda: float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def turn(converted: str, texts: int, tokens: int, threads: int) -> None:
    """Print how many tokens a second ctranslate2 makes."""
    import ctranslate2

    dtype = Path(converted).name
    made = ctranslate2.Generator(converted, compute_type=dtype, inter_threads=1, intra_threads=threads)
    for _ in range(2):  # the first warms up
        wanted = {"max_length": tokens, "min_length": tokens, "sampling_topk": 0, "max_batch_size": texts}
        began = time.monotonic()
        found = made.generate_batch([["t0"]] * texts, include_prompt_in_result=False, **wanted)
    assert all(len(one.sequences_ids[0]) == tokens for one in found)
    print(texts * tokens / (time.monotonic() - began))


LLAMA = """
const [folder, file, texts, tokens, threads] = process.argv.slice(2);
const {getLlama} = await import(`${folder}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: +threads});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: +tokens + 8, sequences: +texts, threads: +threads});
const sequences = Array.from({length: +texts}, () => context.getSequence());
async function write(sequence) {
  let made = 0;
  for await (const id of sequence.evaluate([0], {temperature: 1, yieldEogToken: true})) if (++made == tokens) break;
  await sequence.clearHistory();
}
let began;
for (let i = 0; i < 2; i++) { // the first warms up
  began = performance.now();
  await Promise.all(sequences.map(write));
}
console.log(1000 * texts * tokens / (performance.now() - began));
process.exit(0);
"""


def llama_cpp(shape: str, texts: int, tokens: int, folder: str) -> Speed:
    """Return the same by llama.cpp, which npm installed in the folder NODE_LLAMA_CPP, from a file that lm exports."""
    sizes = dict(SHAPES[shape])
    shown = {"vocab_size": sizes.pop("vocab_size"), "block_size": sizes.pop("block_size")}
    net = {"class_path": "lm.models.GPT", "init_args": {**sizes, "bias": shape != "10M"}}
    tokenizer = CharTokenizer(map(chr, range(48, 48 + 65))) if shape == "10M" else make("gpt2", lambda: ())
    saved = Saved(
        step=0,
        state={NET + name: value for name, value in network(shape).state_dict().items()},
        config={"name": shape, "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": net}}},
        tokenizer=tokenizer.state(),
        **shown,
    )
    place = Path(folder)
    checkpoint.write(saved.imported(), place / "net.ckpt")
    export_gguf(place / "net.ckpt", place / "net.gguf", note=lambda line: None)
    (place / "turn.mjs").write_text(LLAMA)
    words = [os.environ["NODE_LLAMA_CPP"], place / "net.gguf", texts, tokens, torch.get_num_threads()]
    command = ["node", str(place / "turn.mjs"), *map(str, words)]
    return lambda: float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def requests(count: int, longest: int) -> list[Request]:
    """Return requests of different lengths."""
    draw = random.Random(1)
    return [Request(prompt=[0], seed=i, max_new_tokens=draw.randint(16, longest)) for i in range(count)]


def engine(net: nn.Module, slots: int, wanted: list[Request]) -> Callable[[], int]:
    """Return what makes the requests' texts by an engine, and says how many tokens."""
    made = Engine(net, Letters(net.vocab_size), slots=slots)
    return lambda: sum(len(text.tokens) for text in made.run(wanted))


def while_some_wait(net: nn.Module, slots: int, wanted: list[Request]) -> Callable[[], int]:
    """Return the same until the last of them begins: all slots are taken."""
    made = Engine(net, Letters(net.vocab_size), slots=slots)

    def run() -> int:
        texts = [made.submit(request) for request in wanted]
        while made.waiting:
            made.step()
        for text in texts:
            made.cancel(text)
        return sum(len(text.tokens) for text in texts)

    return run


def in_batches(net: nn.Module, size: int, wanted: list[Request]) -> Callable[[], int]:
    """Return what makes the requests' texts in batches, each until its longest ends, and says how many tokens count."""
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    runs = [ours(net, size, max(request.max_new_tokens for request in batch)) for batch in batches]

    def run() -> int:
        for one in runs:
            one()
        return sum(request.max_new_tokens for request in wanted)

    return run


def contestants(shape: str, texts: int, tokens: int, folder: str) -> dict[str, Speed]:
    """Return who takes part, in the order of their turns; ratios are to the first."""
    many = f"{texts} text" + "s" * (texts > 1)
    found: dict[str, Speed] = {}
    try:
        found[f"transformers, float32, {many}"] = timed(theirs(shape, texts, tokens))
        for dtype in ("float32", "int8"):
            found[f"ctranslate2, {dtype}, {many}"] = translated(shape, dtype, texts, tokens, folder)
    except ImportError as error:
        print(f"{error.name} is not installed: pip install 'lm[hf]' ctranslate2 to see them beside ours")
    if "NODE_LLAMA_CPP" in os.environ:
        found[f"llama.cpp, float32, {many}"] = llama_cpp(shape, texts, tokens, folder)
    for dtype in ("float32", "bfloat16", "int8"):
        found[f"generate, {dtype}, {many}"] = timed(ours(packed(network(shape), dtype), texts, tokens))  # type: ignore[arg-type]
    wanted = requests(4 * texts, min(256, 2 * tokens))
    mean = sum(request.max_new_tokens for request in wanted) // len(wanted)
    net = packed(network(shape))
    found[f"generate, float32, {many} of {mean} tokens"] = timed(ours(net, texts, mean))
    if texts > 1:
        them = f"float32, {len(wanted)} requests, {texts} at once"
        found[f"engine, {them}"] = timed(engine(net, texts, wanted))
        found[f"engine, {them}, while some wait"] = timed(while_some_wait(net, texts, wanted))
        found[f"generate, {them}, each batch until its longest ends"] = timed(in_batches(net, texts, wanted))
    return found


def bandwidth() -> float:
    """Return how many bytes a second are read from memory."""
    numbers = torch.ones(1 << 26)  # 256 MB
    times = []
    for _ in range(5):
        began = time.monotonic()
        numbers.sum()
        times.append(time.monotonic() - began)
    return numbers.nbytes / min(times)


def first_token(shape: str, dtype: str, rounds: int) -> float:
    """Return the seconds until the first token after a prompt of half a context."""
    net = packed(network(shape), dtype)  # type: ignore[arg-type]
    prompt = torch.zeros(1, SHAPES[shape]["block_size"] // 2, dtype=torch.int64)
    times = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        next(generate(net, prompt, sampler=Sampler(), generator=torch.Generator()))
        times.append(time.monotonic() - began)
    return statistics.median(times[1:])


def main() -> None:
    """Run all in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10M")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        turn(options.turn, options.texts[0], options.tokens, options.threads)
        return
    torch.set_num_threads(options.threads)
    memory, weights = bandwidth(), sum(one.numel() for one in network(options.shape).parameters())
    print(f"memory is read at {memory / 1e9:.1f} GB/s\n")
    print("| tokens a second | here | / the first | ms a step | bandwidth |")
    print("| --- | --- | --- | --- | --- |")
    for texts in options.texts:
        with tempfile.TemporaryDirectory() as folder:
            runs = contestants(options.shape, texts, options.tokens, folder)
            speeds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    speeds[name].append(run())
        base = next(iter(speeds.values()))
        for name, found in speeds.items():
            ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
            step = texts / statistics.median(found)  # seconds
            size = weights * next(size for dtype, size in BYTES.items() if dtype in name)
            share = f"{size / step / memory:.0%}"
            print(
                f"| {options.shape}: {name} | {texts / step:,.0f} | {ratio:.2f} | {1000 * step:.1f} | {share} |",
                flush=True,
            )
    first = (f"{1000 * first_token(options.shape, dtype, options.rounds):.0f} ({dtype})" for dtype in BYTES)
    print(f"\nms to the first token: {', '.join(first)}")


if __name__ == "__main__":
    main()
