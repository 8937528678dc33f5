"""What happens around the training steps: random state, memory, and what the console shows."""

import ctypes
import gc
import os
import random
import sys
from contextlib import suppress
from typing import IO, Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from lm import log
from lm.checkpoints import schema
from lm.training import lightning_internals
from lm.training.metrics import shown


class RandomState(Callback):
    """Keeps each rank's random state in the checkpoint, where Lightning's have none, and seeds each rank differently.

    Evaluation and sampling draw from generators of their own, so only training steps advance this state.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.saved: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every rank's state; Lightning calls this on all of them."""
        states: list[Any] = [_random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, _random_state())
        checkpoint[schema.RANDOM_STATES] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states for the start of training."""
        self.saved = checkpoint[schema.RANDOM_STATES]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this rank's state; a fresh run, or another number of ranks, seeds each rank differently."""
        if self.saved and len(self.saved) == trainer.world_size:
            _set_random_state(self.saved[trainer.global_rank])
        elif self.saved or trainer.world_size > 1:
            torch.manual_seed(self.seed + 1_000_003 * trainer.global_step + trainer.global_rank)


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


class FrozenHeap(Callback):
    """Keeps the garbage collector from scanning, during training, all objects made before it.

    Autograd's many small objects trigger the collector, and imported modules alone are a million objects: scanning them
    would take a sixth of a small network's step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect once, and exempt what is left from later collections."""
        gc.collect()
        gc.freeze()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the collector scan it again."""
        gc.unfreeze()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do so after an error too: Lightning does not call teardown then."""
        gc.unfreeze()


def keep_memory() -> bool:
    """Let the C library keep the memory of freed tensors, rather than return it to the kernel and ask for it again.

    A fresh page from the kernel costs more than an elementwise operation on it, and a training step on a CPU frees and
    allocates the same megabytes each time. Does nothing where the C library is not glibc.

    Returns:
        Whether it did something.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of glibc's malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
    return bool(mallopt(mmap_threshold, 32 << 20))  # the largest that glibc takes


class KeptMemory(Callback):
    """Calls `keep_memory` when training on a CPU starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let freed memory be kept."""
        if trainer.strategy.root_device.type == "cpu":
            keep_memory()


class OwnCores(Callback):
    """Pins each rank on a CPU to cores of its own, as mpirun does, where the ranks' threads together fill the machine.

    Otherwise the kernel now and then puts two ranks on one core, and all ranks wait for both.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Divide the cores, unless srun or another launcher has done so."""
        if trainer.strategy.root_device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
            return
        cores, ranks, threads = sorted(os.sched_getaffinity(0)), trainer.num_devices, torch.get_num_threads()
        if ranks > 1 and ranks * threads == len(cores):
            own = cores[trainer.local_rank * threads :][:threads]
            for thread in os.listdir("/proc/self/task"):  # the communication threads exist already
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), own)


BAR = "{n_fmt}/{total_fmt} {desc}|{bar}| {elapsed}<{remaining}, {rate_fmt}"
"""tqdm's format. A narrow terminal cuts it off at the right, so the loss stands on the left."""


class Console(Callback):
    """Shows how training goes: a progress bar on a terminal, elsewhere a line for each logged step and evaluation.

    Args:
        stream: Where to print; standard output by default, standard error where results are printed as JSON.
        run: The run's name, for lines that are JSON.
        bar: Whether a terminal gets a bar; not where Lightning draws one.
    """

    def __init__(self, stream: IO[str] | None = None, run: str | None = None, *, bar: bool = True) -> None:
        self.stream, self.run, self.with_bar = stream or sys.stdout, run, bar
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained."""
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        net = module.net
        count = sum(p.numel() for p in net.parameters())
        if module.differences:
            found = ", ".join(map(str, module.differences))
            self._line(f"note: the recipe differs from the checkpoint: {found}", level="warning")
        done = trainer.global_step
        what = f"training {f'from step {done} ' if done else ''}to step {trainer.max_steps}"
        if lightning_internals.nothing_left(trainer):
            what = f"step {done} is done, trainer.max_steps is {trainer.max_steps}: no step is left to train"
        name = type(net).__name__.removeprefix("FSDP")  # a prefix that sharding adds
        self._line(
            f"{name} of {count:,} parameters, {net.vocab_size:,} symbols, context {net.block_size}: "
            f"{what} on {trainer.world_size} x {trainer.strategy.root_device.type}{module.origin}",
            step=trainer.global_step,
            parameters=count,
        )
        if self.with_bar and self.stream.isatty() and not log.as_json():
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.bar = tqdm(
                total=total, initial=done, file=self.stream, unit="step", dynamic_ncols=True, bar_format=BAR
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; show the metrics of a step that was logged."""
        if not trainer.is_global_zero or not lightning_internals.step_finished(trainer, batch_idx):
            return
        module: Any = pl_module
        while module.step.notices:
            self._line(f"note: {module.step.notices.pop(0)}", level="warning", step=trainer.global_step)
        metrics = module.metrics
        logged = metrics.get("step", 0) > trainer.global_step - lightning_internals.steps_per_call(trainer)
        if self.bar is not None:
            if logged:
                self.bar.set_description_str(f"loss {metrics['loss']:.4f} ", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)
        elif logged:
            self._line(
                f"{self._step(trainer, metrics['step'])}  loss {metrics['loss']:.4f}  "
                f"lr {_rates(metrics)}  "
                f"norm {metrics['gradient_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tokens/s",
                **metrics,
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the evaluation."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            values: Any = pl_module.validation
            self._line(
                f"{self._step(trainer, trainer.global_step)}  val_loss "
                + "  ".join([f"{values['loss']:.4f}", *shown(values)]),
                step=trainer.global_step,
                **{f"val_{key}": value for key, value in values.items() if key != "step"},
            )

    def _step(self, trainer: Trainer, step: int) -> str:
        return f"step {step:>{len(str(trainer.max_steps))}}/{trainer.max_steps}"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar before anything else is printed; Lightning does not call teardown then."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.stream.flush()  # its line ends before standard error prints the next
            self.bar = None

    def _line(self, text: str, **fields: Any) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(log.line(text, run=self.run, **fields), file=self.stream, flush=True)


def _rates(metrics: dict[str, float]) -> str:
    """Return the learning rates; a parameter group's own rate follows its name."""
    others = {k.removeprefix("learning_rate_"): v for k, v in metrics.items() if k.startswith("learning_rate_")}
    return f"{metrics['learning_rate']:.2e}" + "".join(f" {name} {rate:.2e}" for name, rate in others.items())
