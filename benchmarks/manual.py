"""Gradients by hand against autograd: time and memory of a training step, side by side in one run.

    LM_DATA_HOME=... python benchmarks/manual.py [--rounds 21] [--only eager] [--case 6×384] [--cpu_time]

Whole steps: gradients, and a fused AdamW's or SGD's update. Both take turns in each round; a figure is the median of
the rounds' ratios. In bfloat16, networks and gradients are in float32, and products by autocast. On a busy machine
--cpu_time takes one thread and counts its own time alone. Memory is the peak of a process's resident memory above what
it had with network and data in place; by hand, and by hand with the blocks' activations computed again.
For the Trainer's cost with gradients by hand against a bare autograd loop, run benchmarks/overhead.py with
`--model lm.training.ManualLanguageModel --model.init_args.compile true`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.backprop import Gradients, loss_and_gradients
from lm.models import GPT, MLP, WaveNet
from lm.training.by_hand import compile_pass
from lm.training.callbacks.process import keep_memory


def gpt(n_layer: int, n_head: int, n_embd: int, block_size: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    net = GPT(65, block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False)
    return net, torch.randint(65, (batch, block_size)), torch.randint(65, (batch, block_size))


LOW, AGAIN = ", bfloat16", "by hand, computed again"
SMALL = "GPT 4×128, context 64, batch 12"
LARGE = "GPT 6×384, context 256, batch 16"
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], int]] = {  # what, and steps a round
    SMALL: (lambda: gpt(4, 4, 128, 64, 12), 20),
    SMALL + LOW: (lambda: gpt(4, 4, 128, 64, 12), 20),
    LARGE: (lambda: gpt(6, 6, 384, 256, 16), 1),
    LARGE + LOW: (lambda: gpt(6, 6, 384, 256, 16), 1),
    "MLP, batch 32": (lambda: (MLP(27, 3), torch.randint(27, (32, 3)), torch.randint(27, (32,))), 400),
    "WaveNet, batch 32": (
        lambda: (WaveNet(27, 8, n_embd=10, n_hidden=68), torch.randint(27, (32, 8)), torch.randint(27, (32,))),
        300,
    ),
}


def steps(name: str, compiled: bool) -> dict[str, Callable[[], None]]:
    """Return a training step by autograd, and steps by hand, of networks with equal initial weights."""
    made = {}
    for kind in ("autograd", "by hand", *([AGAIN] if "GPT" in name else [])):
        torch.manual_seed(1)
        net, tokens, targets = CASES[name][0]()
        parameters = list(net.parameters())
        small = "GPT" not in name
        optimizer: Any = torch.optim.SGD(parameters, lr=0.1) if small else torch.optim.AdamW(parameters, fused=True)
        make = autograd if kind == "autograd" else partial(by_hand, again=kind == AGAIN)
        products = partial(torch.autocast, "cpu", torch.bfloat16) if name.endswith(LOW) else nullcontext
        made[kind] = make(net, parameters, optimizer, tokens, targets, compiled, products)
    return made


def autograd(
    net: Any, parameters: Any, optimizer: Any, tokens: Tensor, targets: Tensor, compiled: bool, products: Any
) -> Any:
    def loss_of(net: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(tokens).float().flatten(0, -2), targets.flatten())

    run = torch.compile(loss_of, dynamic=False, fullgraph=True) if compiled else loss_of

    def step() -> None:
        optimizer.zero_grad()
        with products():
            loss = run(net, tokens, targets)
        loss.backward()
        optimizer.step()

    return step


def by_hand(
    net: Any,
    parameters: Any,
    optimizer: Any,
    tokens: Tensor,
    targets: Tensor,
    compiled: bool,
    products: Any,
    again: bool,
) -> Any:
    grads = Gradients()
    if again:
        grads.recomputed = {*net.h}
    run = compile_pass()

    @torch.no_grad()
    def step() -> None:
        with products():
            if compiled:
                _, found = run(net, parameters, tokens, targets, 1.0)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient
            else:
                grads.begin(parameters)
                loss_and_gradients(net, grads, tokens, targets)
        optimizer.step()

    return step


def timed(step: Callable[[], None], count: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(count):
        step()
    return 1000 * (clock() - began) / count


def compare(name: str, compiled: bool, rounds: int, clock: Callable[[], float]) -> None:
    """Print a row: the ratio of a step's times, and its spread; the times themselves go to standard error."""
    count = CASES[name][1]
    both = {kind: step for kind, step in steps(name, compiled).items() if kind != AGAIN}
    for step in both.values():
        timed(step, count, clock)
    found: dict[str, list[float]] = {kind: [] for kind in both}
    for number in range(rounds):
        for kind in list(both)[:: 1 if number % 2 else -1]:
            found[kind].append(timed(both[kind], count, clock))
    ratios = [b / a for a, b in zip(found["autograd"], found["by hand"], strict=True)]
    a, b = (statistics.median(values) for values in found.values())
    how = "both compiled" if compiled else "eager"
    print(f"{name}, {how}: {a:.3f} ms by autograd, {b:.3f} ms by hand", file=sys.stderr)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"| {name}, {how} | {statistics.median(ratios):.3f} | {spread} |", flush=True)


def peak(name: str, kind: str) -> None:
    """Print the memory that three steps take at their peak, in MiB."""
    step = steps(name, False)[kind]
    before = resident("VmRSS")
    for _ in range(3):
        step()
    print(resident("VmHWM") - before)


def resident(key: str) -> float:
    """Return resident memory in MiB, VmRSS now or VmHWM at its peak; getrusage's peak begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", choices=("eager", "compiled", "memory"))
    parser.add_argument("--case", default="", help="rows whose name has this in it")
    parser.add_argument("--cpu_time", action="store_true", help="one thread, and its own time")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "KIND"))
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else 2)
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.peak:
        peak(*options.peak)
        return
    keep_memory()  # as in lm fit, for both
    print("| by hand / autograd | here | rounds |\n| --- | --- | --- |", flush=True)
    for compiled in (False, True):
        if options.only in (None, "compiled" if compiled else "eager"):
            for name in CASES:
                if options.case in name:
                    compare(name, compiled, options.rounds, clock)
    if options.only in (None, "memory"):
        for name in [LARGE, LARGE + LOW]:
            found = {}
            for kind in ("autograd", "by hand", AGAIN):
                words = [sys.executable, __file__, "--peak", name, kind, *(["--cpu_time"] if options.cpu_time else [])]
                exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory returns at once, and shows
                text = subprocess.run(words, stdout=subprocess.PIPE, env=exact, text=True, check=True).stdout
                found[kind] = float(text)
            print(f"{name}: {found} MiB", file=sys.stderr)
            for kind, suffix in (("by hand", ""), (AGAIN, ", computed again")):
                print(f"| {name}, peak memory{suffix} | {found[kind] / found['autograd']:.3f} | – |")


if __name__ == "__main__":
    main()
