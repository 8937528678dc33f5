"""How much of the engine's speed is left to clients of `lm serve`, and what breaking off leaves behind.

    python benchmarks/serving.py [--clients 64] [--requests 192] [--rounds 3] [--shortest 16] [--longest 256]
    python benchmarks/serving.py --peer transformers                            beside transformers' server
    python benchmarks/serving.py --peer http://127.0.0.1:8001 --model NAME      beside another that runs already
    python benchmarks/serving.py --faults [--requests 1000] [--minutes 10]      a third of the clients break off

The network has random weights, 10.65M parameters and a context of twice --longest, so that no window moves. Servers,
clients and the engine alone are processes of their own, on loopback, and take turns on the same requests.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
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


def drawn(options: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Return the requests: prompts and answers of unequal lengths."""
    draw = random.Random(0)
    lengths = (options.shortest, options.longest)
    return [
        {
            "model": model, "prompt": "".join(draw.choices(LETTERS, k=draw.randint(*lengths))),
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
        for one in drawn(options, "")
    ]
    engine.run(requests[:2])
    began = time.monotonic()
    made = sum(len(text.tokens) for text in engine.run(requests))
    return made / (time.monotonic() - began)


class Answer(asyncio.Protocol):
    """Keeps what comes, and when; nothing is done with it while other clients run: they take the server's processors.

    Args:
        request: Its bytes.
        breaks: Whether to break off after a few pieces.
    """

    def __init__(self, request: bytes, *, breaks: bool) -> None:
        self.request, self.breaks, self.parts = request, breaks, list[tuple[float, bytes]]()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.began = transport, time.monotonic()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Keep what has come, or break off."""
        self.parts.append((time.monotonic(), data))
        if self.breaks and len(self.parts) == 5:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that there is no more."""
        self.ended.set_result(None)

    def pieces(self) -> list[tuple[float, int]]:
        """Return when each piece came, and how many tokens it had; a character is one."""
        found, rest = list[tuple[float, int]](), b""
        for when, data in self.parts:
            *lines, rest = (rest + data).split(b"\n")
            said = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
            texts = [one["text"] for event in said for one in event["choices"]]
            found += [(when, len(text)) for text in texts if text]
        assert found, b"".join(data for _, data in self.parts)
        return found


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
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close"
        bodies = [json.dumps(request).encode() for request in requests]
        asked = [f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        began = time.monotonic()
        answers = asyncio.run(self._run(list(enumerate(asked))[::-1]))
        seconds = time.monotonic() - began
        for answer in answers:
            pieces = answer.pieces()
            self.first.append(pieces[0][0] - answer.began)
            for (before, _), (now, made) in pairwise(pieces):
                self.between += [(now - before) / made] * made
            self.tokens += sum(made for _, made in pieces)
        return seconds

    async def _run(self, left: list[tuple[int, bytes]]) -> list[Answer]:
        answers, loop = list[Answer](), asyncio.get_running_loop()

        async def client() -> None:
            while left:
                number, request = left.pop()
                answer = Answer(request, breaks=self.breaking and number % 3 == 0)
                answers.append(answer)
                await loop.create_connection(lambda: answer, self.address.hostname, self.address.port)  # noqa: B023
                await answer.ended

        await asyncio.gather(*(client() for _ in range(self.clients)))
        return answers


def percentile(values: list[float], share: float) -> str:
    """Return a percentile, in milliseconds."""
    return f"{1000 * sorted(values)[int(share * (len(values) - 1))]:.0f}"


@dataclass
class Server:
    """A server that clients ask: its name in the table, its URL, and its process, where it is ours to end."""

    name: str
    url: str
    model: str
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Server":
        """Use it."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def started(folder: Path, options: argparse.Namespace) -> Server:
    """Start `lm serve`."""
    words = ("--slots", options.clients, "--max_requests", 4 * options.clients, "--port", 0)
    command = [sys.executable, "-m", "lm", "serve", "--ckpt_path", f"random={folder / 'random.ckpt'}", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return Server("lm serve", process.stdout.readline().rsplit(" ", 1)[1].strip(), "random", process)


def transformers_started(folder: Path, options: argparse.Namespace) -> Server:
    """Start transformers' server with the same network; `pip install fastapi` brings what it needs beyond lm[test]."""
    exported, log = str(folder / "exported"), (folder / "transformers.log").open("w")
    words = ("--ckpt_path", str(folder / "random.ckpt"), "--format", "hf", "--output", exported)
    subprocess.run([sys.executable, "-m", "lm", "export", *words], check=True, stdout=subprocess.DEVNULL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    main = "from transformers.cli.transformers import main; main()"
    place = ("--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    words = ("serve", exported, *place, "--continuous-batching", *options.peer_options)
    process = subprocess.Popen([sys.executable, "-c", main, *words], stdout=log, stderr=log, text=True)
    server = Server("transformers serve", f"http://127.0.0.1:{port}", exported, process)
    while process.poll() is None:
        with suppress(OSError), urlopen(f"{server.url}/health"):
            return server
        time.sleep(0.5)
    raise SystemExit((folder / "transformers.log").read_text()[-1000:])


def speeds(folder: Path, options: argparse.Namespace, ending: ExitStack) -> None:
    """Print the table of speeds: the engine alone and the servers take turns."""
    servers = [ending.enter_context(started(folder, options))]
    if options.peer == "transformers":
        servers.append(ending.enter_context(transformers_started(folder, options)))
    elif options.peer:
        servers.append(Server(options.peer_name, options.peer, options.model))
    alone, loads, rates = list[float](), list[Load](), list[list[float]]()
    for turn in range(options.rounds + 1):
        if turn < 2:  # the first warms up
            alone, rates = [], [[] for _ in servers]
            loads = [Load(server.url, options.clients) for server in servers]
        words = [sys.executable, __file__, *sys.argv[1:], "--turn", str(folder / "random.ckpt")]
        alone.append(float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout))
        for server, load, its in zip(servers, loads, rates, strict=True):
            before = load.tokens
            seconds = load.run(drawn(options, server.model))
            its.append((load.tokens - before) / seconds)
    times = [f"{what}, p{q} (ms)" for what in ("first token", "between tokens") for q in (50, 95)]
    print(f"| server | tokens/s | of the engine's | {' | '.join(times)} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for server, load, its in zip(servers, loads, rates, strict=True):
        rate, share = statistics.median(its), statistics.median(its) / statistics.median(alone)
        times = [percentile(values, q) for values in (load.first, load.between) for q in (0.5, 0.95)]
        print(f"| {server.name} | {rate:,.0f} | {100 * share:.0f} % | {' | '.join(times)} |")


def seen(process: subprocess.Popen[str], url: str) -> tuple[float, int, int]:
    """Return a server's memory in MB, its texts in work, and its open files."""
    memory = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    figures = urlopen(f"{url}/metrics").read().decode()
    used = re.search(r'lm_cache_slots_used\{model="random"\} ([\d.]+)', figures)
    assert memory and used
    return int(memory[1]) / 1024, int(float(used[1])), len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def faults(folder: Path, options: argparse.Namespace, ending: ExitStack) -> None:
    """Print what is left after load with clients that break off, and after minutes of it."""
    server = ending.enter_context(started(folder, options))
    assert server.process
    requests = drawn(options, server.model)
    Load(server.url, options.clients).run(requests[: 2 * options.clients])  # all that is allocated once
    print("| requests | of them broken off | memory (MB) | texts in work | open files |")
    print("| --- | --- | --- | --- | --- |")
    until, asked = time.monotonic() + 60 * options.minutes, 0
    while True:
        memory, used, files = seen(server.process, server.url)
        print(f"| {asked:,} | {-(-asked // 3):,} | {memory:.0f} | {used} | {files} |", flush=True)
        if asked and time.monotonic() >= until:
            break
        Load(server.url, options.clients, breaking=True).run(requests)
        asked += len(requests)
        time.sleep(1)  # the last to break off are noticed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10M")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--peer", default="", help="transformers, or the URL of a server that runs already.")
    parser.add_argument("--peer_name", default="peer", help="What the table calls it.")
    parser.add_argument("--peer_options", type=str.split, default=[], metavar="WORDS")
    parser.add_argument("--model", default="random", help="How a peer calls the network.")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--turn", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(engine_alone(options))
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        written(Path(folder) / "random.ckpt", options.shape, 2 * options.longest)
        (faults if options.faults else speeds)(Path(folder), options, ending)


if __name__ == "__main__":
    main()
