"""How fast a GPU trains and samples: GPT-2 124M through the Trainer, by hand, and in a plain loop.

Shapes: B sequences, T tokens.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.overhead import take
from lm.cli.fit import Fit
from lm.cli.parsing import quiet
from lm.cli.plan import Plan
from lm.generation import Sampler, generate
from lm.generation.packed import packed
from lm.models import GPT
from lm.planning.needs import DEVICES
from lm.training.callbacks.checkpointing import Checkpoints
from lm.training.compute import compiler_missing

Say = Callable[[dict[str, Any]], None]
RECIPE = Path(__file__).resolve().parent.parent.parent / "configs/gpt2-124m.yaml"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Size(NamedTuple):
    """How much is measured."""

    net: dict[str, Any]
    vocab_size: int
    block_size: int
    data: list[object]
    batches: tuple[int, ...]
    warm: int
    timed: int
    texts: tuple[int, ...]
    tokens: int


SIZES = {
    "full": Size(
        net={"n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False}, vocab_size=50257, block_size=1024,
        data=[], batches=(16, 32, 64), warm=5, timed=10, texts=(1, 4, 16, 64), tokens=64,
    ),
    "small": Size(
        net={"n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False}, vocab_size=257, block_size=32,
        data=["--data.init_args.corpus", "python-docs", "--data.init_args.tokenizer", "byte"],
        batches=(2,), warm=2, timed=3, texts=(1, 4), tokens=8,
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A step that is timed; `kernel` is attention's, torch's own choice by default."""

    batch: int
    precision: str = "bf16-mixed"
    compiled: bool = False
    kernel: str | None = None


def peak_of(name: str) -> float | None:
    """Return a card's dense bfloat16 operations a second; None where they are not known, as of slower PCIe cards."""
    found = [kind for kind in DEVICES if kind in name.replace(" ", "") and "PCIe" not in name]
    return 1e12 * DEVICES[max(found, key=len)].flops if found else None


def wait() -> None:
    """Wait for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def timed(work: Callable[[], object], times: int) -> float:
    """Return the seconds of one of many calls, after one that is not timed."""
    work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def machine(size: str, seconds: float, say: Say) -> None:
    """Say which card it is, and how fast it multiplies and copies: what all else is measured by."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    say({"device": name, "peak_flops": peak_of(name), "torch": torch.__version__, "cuda": torch.version.cuda,
         "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else None,
         "compiler_missing": compiler_missing(DEVICE)})  # fmt: skip
    n, times = (8192, 20) if size == "full" else (256, 3)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    say({"product": f"{n}³ bfloat16", "tflops": 2 * n**3 / timed(lambda: a @ b, times) / 1e12})
    source = torch.randn(n << 16, device=DEVICE) if size == "full" else a
    target = torch.empty_like(source)
    say({"copy_gb": source.nbytes / 1e9, "read_and_written_gb_per_second": 2 * source.nbytes / 1e9
         / timed(lambda: target.copy_(source), times)})  # fmt: skip


class Clock(Callback):
    """Times steps, from the end of one to the end of a later one, and notes the peak of the GPU's memory meanwhile."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.began = self.seconds = 0.0
        self.peak: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look at the clock."""
        step = trainer.global_step
        if step not in (self.first, self.last):
            return
        wait()
        if step == self.first:
            reset_peak()
            self.began = time.perf_counter()
        else:
            self.seconds, self.peak = time.perf_counter() - self.began, peak_gb()


def reset_peak() -> None:
    """Let `peak_gb` forget what was before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """Return the most that tensors have taken of the GPU's memory, in GB; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


def words_of(size: Size, case: Case, module: str) -> list[str]:
    """Return the recipe of a case, for `lm fit` and `lm plan`."""
    net = "--model.init_args.net.init_args"
    words: list[object] = ["--config", RECIPE, "--model", f"lm.training.{module}"]
    words += [one for key, value in size.net.items() for one in (f"{net}.{key}", value)]
    words += [*size.data, "--data.init_args.block_size", size.block_size, "--data.init_args.batch_size", case.batch]
    words += ["--trainer.accumulate_grad_batches", 1, "--trainer.precision", case.precision, "--trainer.devices", 1]
    words += ["--trainer.max_steps", size.warm + size.timed + 1, "--trainer.log_every_n_steps", 1000]
    words += ["--model.init_args.compile", case.compiled, "--trainer.limit_val_batches", 0]
    words += ["--figures.every_n_steps", 0, "--samples.max_new_tokens", 0]
    return [str(word).lower() if isinstance(word, bool) else str(word) for word in words]


def through_the_trainer(size: Size, case: Case, module: str) -> dict[str, Any]:
    """Time steps of `lm fit`, without saving 1.5 GB at its end."""
    words = words_of(size, case, module)
    cli = Fit(words, "")
    clock = Clock(size.warm, size.warm + size.timed)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [clock, *(one for one in callbacks if not isinstance(one, Checkpoints))]
    with nullcontext() if case.kernel is None else sdpa_kernel(getattr(SDPBackend, case.kernel)):
        cli.run()
    plan = planned(size, case)
    return figures(size, case, clock.seconds / size.timed, clock.peak, plan["flops_per_token"]) | {
        "plan_peak_gb": plan["memory_gb"]["ddp"]["peak"]
    }


def planned(size: Size, case: Case) -> dict[str, Any]:
    """Return what `lm plan` says of a case: of autograd, uncompiled, whatever the case."""
    return _planned(tuple(words_of(size, Case(case.batch, case.precision), "LanguageModel")))


@cache
def _planned(words: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = Plan(list(words), "").run()
    return found


def figures(size: Size, case: Case, seconds: float, peak: float | None, flops: float) -> dict[str, Any]:
    """Return what is said of a step of so many seconds.

    Args:
        size: Says T.
        case: Says B.
        seconds: Of a step.
        peak: Of the GPU's memory, in GB.
        flops: Of a token; attention counted in full, as `lm plan` does.
    """
    speed = case.batch * size.block_size / seconds
    most = peak_of(torch.cuda.get_device_name()) if CUDA else None
    return {
        "step_ms": 1000 * seconds,
        "tokens_per_second": speed,
        "mfu": speed * flops / most if most else None,
        "peak_gb": peak,
    }


def each(size: Size, cases: list[Case], find: Callable[[Size, Case], dict[str, Any]], say: Say) -> None:
    """Measure cases in turn; one that fails, for want of memory say, is recorded with its error."""
    quiet()
    home = Path.cwd()
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                found = find(size, case)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            os.chdir(home)
        say(case._asdict() | found)
        gc.collect()
        torch.compiler.reset()
        if CUDA:
            torch.cuda.empty_cache()


def steps(size: str, seconds: float, say: Say) -> None:
    """Time steps by autograd: the most telling first, as the time may not be enough for all."""
    one = SIZES[size]
    first, middle, last = one.batches[0], one.batches[len(one.batches) // 2], one.batches[-1]
    kernels = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    cases = [*(Case(batch) for batch in one.batches), Case(last, compiled=True), Case(first, "32-true")]
    cases += [Case(middle, kernel=kernel) for kernel in (kernels if CUDA else ("FLASH_ATTENTION", "MATH"))]
    cases += [Case(batch, compiled=True) for batch in reversed(one.batches[:-1])]  # each takes most of a minute
    each(one, cases, lambda size, case: through_the_trainer(size, case, "LanguageModel"), say)


def by_hand(size: str, seconds: float, say: Say) -> None:
    """Time steps by hand."""
    one = SIZES[size]
    cases = [Case(batch) for batch in one.batches]
    cases += [Case(one.batches[-1], compiled=True), Case(one.batches[0], "32-true")]
    each(one, cases, lambda size, case: through_the_trainer(size, case, "ManualLanguageModel"), say)


def plain(size: str, seconds: float, say: Say) -> None:
    """Time steps of a plain loop on data that is on the card already."""
    one = SIZES[size]
    cases = [Case(one.batches[-1]), Case(one.batches[-1], compiled=True), *(Case(batch) for batch in one.batches[:-1])]
    each(one, cases, in_a_loop, say)


def in_a_loop(size: Size, case: Case) -> dict[str, Any]:
    """Time steps of the same network, optimizer and clipping in the bare loop of benchmarks/overhead.py."""
    torch.manual_seed(0)
    net: Any = GPT(size.vocab_size, size.block_size, **size.net).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = torch.randint(size.vocab_size, (4, 2, case.batch, size.block_size), device=DEVICE)
    if case.compiled:
        net.compile()

    def run(count: int) -> None:
        for i in range(count):
            tokens, targets = batches[i % len(batches)]
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
                take(net, optimizer, tokens, targets, clip_norm=1.0)
        wait()

    run(size.warm)
    reset_peak()
    began = time.perf_counter()
    run(size.timed)
    seconds = (time.perf_counter() - began) / size.timed
    flops = planned(size, Case(size.batches[0]))["flops_per_token"]  # the same for all batches
    return figures(size, case, seconds, peak_gb(), flops)


def sampling(size: str, seconds: float, say: Say) -> None:
    """Time `generate`, in the weights' own type and in bfloat16."""
    one = SIZES[size]
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        net = packed(GPT(one.vocab_size, one.block_size, **one.net).to(DEVICE).eval(), dtype)  # type: ignore[arg-type]
        weights = sum(value.nbytes for value in net.parameters()) if CUDA else 0
        for texts in one.texts:
            prompt = torch.zeros(texts, 1, dtype=torch.int64, device=DEVICE)
            made = generate(net, prompt, sampler=Sampler(), generator=torch.Generator().manual_seed(1))
            token = timed(lambda made=made: next(made), one.tokens)  # type: ignore[misc]
            say({"dtype": dtype, "texts": texts, "tokens_per_second": texts / token, "ms_a_token": 1000 * token,
                 "weights_gb_per_second": weights / 1e9 / token if CUDA else None})  # fmt: skip
