"""What `lm bench` measures beside training: matrix products, which say what a machine can do at most; and generation.

Each function here is the work of one process of `lm.planning.turns`.

Shapes: B texts, T tokens.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm.generation.packed import Dtype, packed
from lm.generation.sampling import Sampler, generate
from lm.planning.turns import Wait
from lm.training import compute

SIZES = {"cpu": 1024}
"""Rows and columns of the matrices that are multiplied; a GPU needs larger ones to be busy."""
LARGE = 8192
SHORTEST = 0.1  # seconds of a turn of products
DTYPES = {"64": "float64", "bf16": "bfloat16", "16": "float16"}


def dtype_of(precision: str) -> str:
    """Return the name of the dtype in which a precision of the Trainer multiplies."""
    return DTYPES.get(precision.partition("-")[0], "float32")


def products(dtype: str, device: str, wait: Wait) -> None:
    """Multiply square matrices; report the FLOP/s of each turn's fastest product.

    Args:
        dtype: Of the matrices: the name of a torch.dtype.
        device: Where they are.
        wait: Any order is a turn.
    """
    size = SIZES.get(device, LARGE)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    report: dict[str, Any] = {}
    while True:
        wait(report)
        fastest, began = float("inf"), time.perf_counter()
        while (now := time.perf_counter()) - began < SHORTEST:
            torch.mm(a, b)
            if device != "cpu":
                torch.accelerator.synchronize()
            fastest = min(fastest, time.perf_counter() - now)
        report = {"flops": 2 * size**3 / fastest}


def generation(net: nn.Module, start: int, dtype: Dtype, device: torch.device, wait: Wait) -> None:
    """Write a text, token by token; report how long a token takes.

    The text grows to the network's context, and begins anew.

    Args:
        net: The network, on the CPU.
        start: The first token.
        dtype: Of the weights, as of `lm sample`.
        device: Where it computes.
        wait: An order has the tokens of a turn: {"steps": N}.
    """
    longest = int(net.block_size)  # type: ignore[arg-type]
    net = packed(net.eval().to(device), dtype)
    prompt = torch.tensor([[start]], device=device)  # (1, 1)
    report: dict[str, Any] = {"precision": "32-true" if dtype == "float32" else "bf16-true"}
    tokens = _texts(net, prompt, longest)
    while True:
        steps = wait(report)["steps"]
        began = time.perf_counter()
        for _ in range(steps):
            next(tokens)
        report = {
            "steps": steps,
            "step_ms": 1000 * (time.perf_counter() - began) / steps,
            "tokens": 1,
            "peak_memory_mb": round(compute.peak_memory(device) / 2**20, 1),
        }


def _texts(net: nn.Module, prompt: Tensor, longest: int) -> Iterator[Tensor]:
    """Yield the tokens of one text after another."""
    generator = torch.Generator().manual_seed(1)
    while True:
        text = generate(net, prompt, sampler=Sampler(), generator=generator)
        yield from (next(text) for _ in range(longest))
