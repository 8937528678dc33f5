"""How much of the engine's speed is left to clients of `lm serve`, and what breaking off leaves behind.

    python benchmarks/serving.py [--clients 64] [--requests 192] [--rounds 3] [--shortest 16] [--longest 256]
    python benchmarks/serving.py --peer http://127.0.0.1:8001 --model NAME      another server by the same requests
    python benchmarks/serving.py --faults [--requests 1000] [--minutes 10]      a third of the clients break off

The network has random weights, 10.65M parameters and a context of twice --longest, so that no window moves. Server,
clients and the engine alone are processes of their own, on loopback; server and engine take turns on the same requests.
A peer is whatever speaks OpenAI's protocol and has been started already: transformers' `serve`, llama.cpp's server.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch

from lm.checkpoints import checkpoint
from lm.checkpoints.restore import load_network
from lm.checkpoints.schema import NET, Saved
from lm.generation.engine import Engine, Request
from lm.generation.packed import packed
from lm.models import GPT
from lm.tokenizers import CharTokenizer, to_state

LETTERS = "".join(chr(33 + i) for i in range(64)) + " "
SHAPES = {"10M": {"n_layer": 6, "n_head": 6, "n_embd": 384}, "tiny": {"n_layer": 1, "n_head": 2, "n_embd": 32}}


def written(path: Path, shape: str, block_size: int) -> None:
    """Write the checkpoint of a random network."""
    torch.manual_seed(0)
    tokenizer, settings = CharTokenizer(LETTERS), {**SHAPES[shape], "bias": False}
    net = GPT(tokenizer.n_vocab, block_size, **settings)
    named = {"class_path": "lm.models.GPT", "init_args": settings}
    recipe = {
        "name": "random", "trainer": {"precision": "32-true"},
        "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": named}},
        "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "none", "block_size": block_size}},
    }  # fmt: skip
    saved = Saved(
        step=0, state={NET + name: value for name, value in net.state_dict().items()}, config=recipe,
        tokenizer=to_state(tokenizer), vocab_size=tokenizer.n_vocab, block_size=block_size, validation={"step": 0},
    )  # fmt: skip
    checkpoint.write(saved.imported(), path)


def drawn(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the requests: prompts and answers of unequal lengths."""
    draw = random.Random(0)
    lengths = (options.shortest, options.longest)
    return [
        {
            "model": options.model, "prompt": "".join(draw.choices(LETTERS, k=draw.randint(*lengths))),
            "max_tokens": draw.randint(*lengths), "seed": i, "stream": True,
        }
        for i in range(options.requests)
    ]  # fmt: skip


def engine_alone(options: argparse.Namespace) -> float:
    """Return the tokens a second that the engine makes of the requests."""
    fitted = load_network(Path(options.turn))
    engine = Engine(packed(fitted.net), fitted.tokenizer, slots=options.clients)
    requests = [
        Request(
            prompt=fitted.tokenizer.encode(one["prompt"]).tolist(), seed=one["seed"], max_new_tokens=one["max_tokens"]
        )
        for one in drawn(options)
    ]
    engine.run(requests[:2])
    began = time.monotonic()
    made = sum(len(text.tokens) for text in engine.run(requests))
    return made / (time.monotonic() - began)


class Load:
    """Clients that ask one request after another, and what they have seen.

    Args:
        url: Of the server.
        clients: How many at once.
        breaking: Whether every third breaks off after a few pieces.
    """

    def __init__(self, url: str, clients: int, *, breaking: bool = False) -> None:
        self.address, self.clients, self.breaking = urlsplit(url), clients, breaking
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0

    def run(self, requests: list[dict[str, Any]]) -> float:
        """Ask all; return the seconds that it took."""
        began = time.monotonic()
        asyncio.run(self._run(list(enumerate(requests))[::-1]))
        return time.monotonic() - began

    async def _run(self, left: list[tuple[int, dict[str, Any]]]) -> None:
        async def client() -> None:
            while left:
                number, request = left.pop()
                await self._ask(request, breaks=self.breaking and number % 3 == 0)

        await asyncio.gather(*(client() for _ in range(self.clients)))

    async def _ask(self, request: dict[str, Any], *, breaks: bool) -> None:
        body = json.dumps(request).encode()
        reader, writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close"
        began = last = time.monotonic()
        writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        status, pieces = await reader.readline(), 0
        assert b" 200 " in status, status + await reader.read()
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            made = len(json.loads(line[6:])["choices"][0]["text"])  # a character is a token
            now = time.monotonic()
            if not pieces:
                self.first.append(now - began)
            elif made:
                self.between += [(now - last) / made] * made
            self.tokens, last, pieces = self.tokens + made, now, pieces + 1
            if breaks and pieces == 4:
                break
        writer.close()


def percentile(values: list[float], share: float) -> str:
    """Return a percentile, in milliseconds."""
    return f"{1000 * sorted(values)[int(share * (len(values) - 1))]:.0f}"


def started(folder: Path, options: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return its process and its URL."""
    words = ("--slots", options.clients, "--max_requests", 4 * options.clients, "--port", 0)
    command = [sys.executable, "-m", "lm", "serve", "--ckpt_path", f"random={folder / 'random.ckpt'}", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().rsplit(" ", 1)[1].strip()


def speeds(folder: Path, options: argparse.Namespace) -> None:
    """Print the table of speeds."""
    process, url = started(folder, options) if not options.peer else (None, options.peer)
    alone, load, rates = list[float](), Load(url, options.clients), list[float]()
    for turn in range(options.rounds + 1):
        if not options.peer:
            words = [sys.executable, __file__, *sys.argv[1:], "--turn", str(folder / "random.ckpt")]
            alone.append(float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout))
        before = load.tokens
        seconds = load.run(drawn(options))
        rates.append((load.tokens - before) / seconds)
        if not turn:  # the first warms up
            alone, rates, load = [], [], Load(url, options.clients)
    if process is not None:
        process.terminate()
        process.wait()
    rate = statistics.median(rates)
    share = f"{100 * rate / statistics.median(alone):.0f} %" if alone else "–"
    print("| server | tokens/s | of the engine's | first token, p50 (ms) | p95 | between tokens, p50 (ms) | p95 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    times = [percentile(values, q) for values in (load.first, load.between) for q in (0.5, 0.95)]
    print(f"| {options.peer_name if options.peer else 'lm serve'} | {rate:,.0f} | {share} | {' | '.join(times)} |")


def seen(process: subprocess.Popen[str], url: str) -> tuple[float, int, int]:
    """Return a server's memory in MB, its texts in work, and its open files."""
    memory = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    figures = urlopen(f"{url}/metrics").read().decode()
    used = re.search(r'lm_cache_slots_used\{model="random"\} ([\d.]+)', figures)
    assert memory and used
    return int(memory[1]) / 1024, int(float(used[1])), len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def faults(folder: Path, options: argparse.Namespace) -> None:
    """Print what is left after load with clients that break off."""
    process, url = started(folder, options)
    requests = drawn(options)
    Load(url, options.clients).run(requests[: 2 * options.clients])  # all that is allocated once
    print("| after | memory (MB) | texts in work | open files |\n| --- | --- | --- | --- |")
    until = time.monotonic() + 60 * options.minutes
    rounds = 0
    while rounds < 2 or time.monotonic() < until:
        if rounds:
            Load(url, options.clients, breaking=True).run(requests)
            time.sleep(1)
        memory, used, files = seen(process, url)
        if rounds < 2 or time.monotonic() >= until:
            print(f"| {rounds * len(requests):,} requests | {memory:.0f} | {used} | {files} |")
        rounds += 1
    process.terminate()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10M")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--peer", default="", metavar="URL")
    parser.add_argument("--peer_name", default="peer")
    parser.add_argument("--model", default="random", help="How the peer calls it.")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(engine_alone(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "random.ckpt", options.shape, 2 * options.longest)
        (faults if options.faults else speeds)(Path(folder), options)


if __name__ == "__main__":
    main()
