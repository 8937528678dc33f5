"""Where a training step's time goes: steps by autograd of two settings, in turns, and the ratio of their times.

    python benchmarks/step.py [--rounds 11] [--only dropout] [--cpu_time]

A step is forward pass, backward pass, and update, of GPT 6×256 with context 256 and batches of 16. "Today's layout" is
rotary positions, RMSNorm, QK-norm and squared ReLU, trained by Muon; "plain" is GPT-2's, by a fused AdamW. The plain
loop is nanoGPT's network of the same shape written out below, as short as it goes. Two threads; on a busy machine
--cpu_time, which takes one thread and counts its own time alone.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.models import GPT
from lm.training.callbacks.process import keep_memory
from lm.training.division import Division
from lm.training.objectives import CrossEntropy
from lm.training.optimizers import MuonAdamW, parameter_groups

V, T, B = 65, 256, 16
SHAPE: dict[str, Any] = {"n_layer": 6, "n_head": 4, "n_embd": 256, "bias": False}
LAYOUT: dict[str, Any] = {"positions": "rotary", "norm": "rms", "qk_norm": True, "feed_forward": "relu_squared"}
DROPOUT: dict[str, Any] = {"dropout": 0.1, "key_dropout": True}
Step = Callable[[], None]


def ours(low: bool, muon: bool = False, **settings: Any) -> Step:
    """Return a step of lm's network, by lm's loss."""
    net = GPT(V, T, **{**SHAPE, **settings})
    groups = parameter_groups(net)
    optimizer = MuonAdamW(groups, fused=True) if muon else torch.optim.AdamW(groups, lr=1e-3, fused=True)
    objective, division = CrossEntropy(), Division()
    return step_of(low, optimizer, net, lambda logits, targets: objective(logits, targets, division))


def plain(low: bool, **settings: Any) -> Step:
    """Return a step of the plain loop."""
    net = Plain(**{**SHAPE, **settings})
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    return step_of(
        low, optimizer, net, lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    )


def step_of(low: bool, optimizer: Any, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            value = loss(net(tokens), targets)
        value.backward()
        optimizer.step()

    return step


class Plain(nn.Module):
    """nanoGPT's network: learned positions, LayerNorm, GELU by erf, tied head."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head

        def linear(into: int, out: int) -> nn.Linear:
            return nn.Linear(into, out, bias=bias)

        self.wte, self.wpe = nn.Embedding(V, n_embd), nn.Embedding(T, n_embd)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(n_embd, bias=bias),
                    linear(n_embd, 3 * n_embd),
                    linear(n_embd, n_embd),
                    nn.LayerNorm(n_embd, bias=bias),
                    nn.Sequential(linear(n_embd, 4 * n_embd), nn.GELU(), linear(4 * n_embd, n_embd)),
                ]
            )
            for _ in range(n_layer)
        )
        self.ln_f, self.head = nn.LayerNorm(n_embd, bias=bias), linear(n_embd, V)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of tokens (B, T)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        block: Any
        for block in self.blocks:
            norm_1, attention, projection, norm_2, mlp = block
            q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in attention(norm_1(x)).chunk(3, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + projection(y.transpose(1, 2).flatten(2))
            x = x + mlp(norm_2(x))
        return self.head(self.ln_f(x))


LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384}
PAIRS: dict[str, tuple[Callable[[bool], Step], Callable[[bool], Step]]] = {
    "dropout 0.1 / none": (lambda low: ours(low, **DROPOUT), ours),
    "today's layout / plain": (lambda low: ours(low, **LAYOUT), ours),
    "today's layout, Muon / plain": (lambda low: ours(low, muon=True, **LAYOUT), ours),
    "today's layout, Muon, dropout 0.1 / plain": (lambda low: ours(low, muon=True, **DROPOUT, **LAYOUT), ours),
    "GELU by tanh / by erf": (ours, lambda low: ours(low, feed_forward="gelu_erf")),
    "lm / a plain loop": (ours, plain),
    "lm / a plain loop, 6×384": (lambda low: ours(low, **LARGE), lambda low: plain(low, **LARGE)),
}


def compare(pair: tuple[Callable[[bool], Step], Callable[[bool], Step]], low: bool, rounds: int, clock: Any) -> str:
    """Return the median ratio of a pair's step times, and its spread."""
    steps = [make(low) for make in pair]
    for step in steps:
        step()
    ratios = []
    for number in range(rounds):
        times = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            began = clock()
            steps[which]()
            times[which] = clock() - began
        ratios.append(times[0] / times[1])
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--cpu_time", action="store_true", help="one thread, and its own time")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else 2)
    clock = time.process_time if options.cpu_time else time.perf_counter
    keep_memory()  # as in lm fit, for both
    print("| step / step | float32 | bfloat16 |\n| --- | --- | --- |", flush=True)
    for name, pair in PAIRS.items():
        if options.only in name:
            print(f"| {name} |", end="", flush=True)
            for low in (False, True):
                torch.manual_seed(1)
                print(f" {compare(pair, low, options.rounds, clock)} |", end="", flush=True)
            print(flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
