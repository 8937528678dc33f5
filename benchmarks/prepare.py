"""What preparing, serving and tokenizer training cost, on a corpus made from the text at hand.

    LM_DATA_HOME=... python benchmarks/prepare.py [--megabytes 200] [--rounds 3] [--only prepare memory serve tokenizer]

The corpus: Shakespeare and the Python files of this environment, a document each, as JSON lines; each round through
them begins its documents with a number, so that none repeats.

- prepare: `lm prepare` with GPT-2's tokenizer, reading and writing included, against tiktoken's encode_ordinary_batch
  on the same documents, already in memory, with two threads; they take turns, each in a process of its own.
- memory: the peak of `lm prepare`, all its processes together (PSS), at that size and at ten times that size.
- serve: batches of 64 × 1,024 tokens, against a step of GPT-2 124M on an H100: 0.857 GFLOP a token (6 N + 12 L C T, of
  nanoGPT's count), 65,536 tokens, at half of the 989 TFLOP/s that the card can do at most, is 114 ms. And batches of
  configs/shakespeare-cpu.yaml against forward and backward pass of its network here.
- tokenizer: `lm tokenizer --vocab_size 8192`, seconds, peak memory; bytes per token on tiny Shakespeare, and GPT-2's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
H100_STEP = 65_536 * (6 * 124e6 + 12 * 12 * 768 * 1024) / (0.5 * 989e12)


def documents() -> list[str]:
    """Return the texts at hand."""
    from lm.corpus import sources

    texts = sources.find("shakespeare").read().split("\n\n")
    scenes = ["\n\n".join(texts[i : i + 40]) for i in range(0, len(texts), 40)]
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")}
    programs = sorted({path for folder in folders for path in Path(folder).rglob("*.py")})
    return scenes + [path.read_text(errors="replace")[:200_000] for path in programs]


def make_corpus(path: Path, megabytes: int) -> None:
    """Write a corpus of about that size."""
    texts, size, turn = documents(), 0, 0
    with path.open("w") as file:
        while size < megabytes * 10**6:
            for text in texts:
                size += file.write(json.dumps({"text": f"{turn}\n{text}"}, ensure_ascii=False) + "\n")
                if size >= megabytes * 10**6:
                    break
            turn += 1


def tiktoken_alone(path: Path) -> None:
    """Encode a corpus as tiktoken does; print the seconds, without reading."""
    from lm import tokenizers

    encoding = tokenizers.make("gpt2", str)._encoding  # type: ignore[attr-defined]
    encoding.encode_ordinary("warm up")
    took, batch = 0.0, []
    with path.open() as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == 1000:
                took, batch = took + timed(lambda b=batch: encoding.encode_ordinary_batch(b, num_threads=2)), []
    took += timed(lambda: encoding.encode_ordinary_batch(batch, num_threads=2))
    print(took)


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_memory(process: subprocess.Popen) -> float:
    """Wait for a process; return the peak of it and its children together, proportional set size, in MB."""
    peak = 0
    while process.poll() is None:
        total = 0
        for pid in descendants(process.pid):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{process.args} failed")
    return peak / 1000


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in descendants(int(child)))]


def lm(*words: object) -> list[str]:
    """Return the command line of `lm`."""
    return [sys.executable, "-m", "lm", *map(str, words)]


def prepare_command(corpus: Path, output: Path) -> list[str]:
    """Return the command that prepares a corpus."""
    return lm("prepare", "--source", corpus, "--tokenizer", "gpt2", "--output", output, "--workers", 2, "--json")


def print_row(what: str, figure: str, rounds: str = "–") -> None:
    """Print a row of the table."""
    print(f"| {what} | {figure} | {rounds} |", flush=True)


def bench_prepare(folder: Path, corpus: Path, rounds: int) -> None:
    """Print the throughput of lm prepare, as a share of tiktoken's."""
    size, ratios = corpus.stat().st_size / 1e6, []
    for k in range(rounds):
        alone = subprocess.run([sys.executable, __file__, "--tiktoken", corpus], stdout=subprocess.PIPE, check=True)
        theirs = float(alone.stdout)
        command = prepare_command(corpus, folder / f"out{k}")
        ours = timed(
            lambda c=command: subprocess.run(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        )
        ratios.append(theirs / ours)
        speeds = f"tiktoken {size / theirs:.1f} MB/s, lm prepare {size / ours:.1f} MB/s"
        print(f"round {k}: {speeds}: {ratios[-1]:.3f}", file=sys.stderr)
    rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print_row(f"`lm prepare` / tiktoken, throughput on {size:.0f} MB", f"{statistics.median(ratios):.2f}", rounds)


def bench_memory(folder: Path, megabytes: int) -> None:
    """Print the peak memory of lm prepare at two sizes."""
    for size in (megabytes, 10 * megabytes):
        corpus = folder / f"{size}.jsonl"
        if not corpus.exists():
            make_corpus(corpus, size)
        began = time.monotonic()
        peak = peak_memory(subprocess.Popen(prepare_command(corpus, folder / f"memory{size}"), **QUIET))
        print(f"peak memory at {size} MB: {time.monotonic() - began:.0f} s", file=sys.stderr)
        print_row(f"peak memory of `lm prepare`, all processes, {size:,} MB", f"{peak:.0f} MB")


def bench_serve(folder: Path) -> None:
    """Print what serving costs."""
    import torch
    import yaml

    from lm.corpus import shards
    from lm.data import TextData
    from lm.models import GPT

    found = []
    for order in ("random", "permutation"):
        for across in (True, False):
            data = TextData(
                corpus=str(folder / "out0"), block_size=1024, batch_size=64, order=order, across_documents=across
            )
            found.append(seconds := serving(data))
            print(
                f"64 x 1,024 tokens, {order}, across documents {across}: {seconds * 1e3:.2f} ms, a step of GPT-2 on an "
                f"H100 (derived, {H100_STEP * 1e3:.0f} ms) / that: {H100_STEP / seconds:.0f}",
                file=sys.stderr,
            )
    least, most = (f"{seconds * 1e3:.1f}" for seconds in (min(found), max(found)))
    print_row("serving 64 × 1,024 tokens of a prepared corpus", f"{least} to {most} ms")
    recipe = yaml.safe_load(Path("configs/shakespeare-cpu.yaml").read_text())
    size = recipe["data"]["init_args"]
    shards.HELD = 0  # from the disk, as a large corpus is
    data = TextData(corpus=str(folder / "out0"), block_size=size["block_size"], batch_size=size["batch_size"])
    seconds = serving(data)
    net = GPT(65, size["block_size"], **recipe["model"]["init_args"]["net"]["init_args"])
    tokens = torch.randint(65, (size["batch_size"], size["block_size"]))

    def step() -> None:
        torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()

    took = statistics.median(timed(step) for _ in range(20))
    print_row("serving a batch / forward and backward pass, shakespeare-cpu", f"{seconds / took:.2%}")


def serving(data) -> float:
    """Return the median seconds of a training batch."""
    data.prepare_data()
    data.setup("fit")
    dataset = data.train_dataset()
    _ = [dataset[k] for k in range(20)]
    return statistics.median(timed(lambda k=k: dataset[k]) for k in range(20, 220))


def bench_tokenizer(folder: Path, corpus: Path) -> None:
    """Print what training an encoding costs, and how it compares with GPT-2's."""
    from lm import tokenizers
    from lm.corpus import sources

    began = time.monotonic()
    command = lm("tokenizer", "--source", corpus, "--vocab_size", 8192, "--output", folder / "a.tiktoken", "--json")
    peak = peak_memory(subprocess.Popen(command, **QUIET))
    size = corpus.stat().st_size / 1e6
    print_row(f"`lm tokenizer`, 8,192 tokens on {size:.0f} MB", f"{time.monotonic() - began:.0f} s, {peak:.0f} MB")
    files = Path(os.environ["LM_DATA_HOME"]) / "tinyshakespeare.txt"
    command = lm("tokenizer", "--source", files, "--vocab_size", 8192, "--output", folder / "b.tiktoken", "--json")
    ours = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["bytes_per_token"]
    text = sources.find("shakespeare").read()
    theirs = len(text.encode()) / len(tokenizers.make("gpt2", str).encode(text))
    what = "bytes a token on tiny Shakespeare: 8,192 tokens trained on it, GPT-2's 50,257"
    print_row(what, f"{ours:.3f}, {theirs:.3f}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("prepare", "memory", "serve", "tokenizer")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--tiktoken", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiktoken:
        tiktoken_alone(options.tiktoken)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("| what | here | rounds |\n| --- | --- | --- |", flush=True)
        corpus = folder / f"{options.megabytes}.jsonl"
        make_corpus(corpus, options.megabytes)
        if "prepare" in options.only or "serve" in options.only:
            bench_prepare(folder, corpus, options.rounds if "prepare" in options.only else 1)
        if "serve" in options.only:
            bench_serve(folder)
        if "tokenizer" in options.only:
            bench_tokenizer(folder, corpus)
        if "memory" in options.only:
            bench_memory(folder, options.megabytes)


if __name__ == "__main__":
    main()
