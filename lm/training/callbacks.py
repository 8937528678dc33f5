"""What happens around the training steps: checkpoints, random state, signals, and what the console shows."""

import ctypes
import gc
import math
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from tqdm import tqdm

from lm.errors import CheckError, Stopped, UserError
from lm.training import checkpoint as files
from lm.training import progress


class Checkpoints(Checkpoint):
    """Writes last.ckpt, best.ckpt and step=NNNNNNN.ckpt into the run's folder.

    Where a step is both to be evaluated and saved, it is saved after the evaluation, so that a checkpoint never owes
    one. Lightning's ModelCheckpoint is not used: it ties last.ckpt to its best ones and may leave it stale (Lightning
    issues 20245, 19189), and it does not save at a stop.

    Args:
        every_n_steps: Optimizer steps between periodic checkpoints.
        keep_last: How many periodic checkpoints to keep; null keeps all.
    """

    def __init__(self, *, every_n_steps: int = 1000, keep_last: int | None = None) -> None:
        for name, number in {"every_n_steps": every_n_steps, "keep_last": keep_last}.items():
            if number is not None and number < 1:
                raise UserError(f"checkpoint.{name} is {number}: it must be at least 1")
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.folder = Path("checkpoints")  # the command line sets both
        self.start = 0
        self.best: float = math.inf
        self.saved_step = self.validated_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation loss and the step that was last evaluated."""
        return {"best": self.best, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take these over."""
        self.best, self.validated_step = state_dict["best"], state_dict["validated_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Number the start that writes this checkpoint: one that went back to an earlier step is still the newer."""
        checkpoint["start"] = self.start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget another run's best loss: best.ckpt is this run's own. Make up for an evaluation that was cut short."""
        origin = Path(trainer.ckpt_path or self.folder / "none").resolve()
        if origin.parent != self.folder.resolve() or not (self.folder / "best.ckpt").exists():
            self.best = math.inf
        if trainer.global_step and progress.validation_due(trainer) and self.validated_step != trainer.global_step:
            progress.validate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a periodic checkpoint, unless an evaluation comes first."""
        if progress.step_finished(trainer, batch_idx) and not progress.validation_due(trainer):
            self._periodic(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best checkpoint where this is it, and the periodic one where it is due."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        loss = float(trainer.callback_metrics.get("val_loss", math.inf))
        if loss < self.best:
            self.best = loss
            self._save(trainer, self.folder / "best.ckpt")
        self._periodic(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and save the last step, whatever the intervals."""
        if progress.validates(trainer) and self.validated_step != trainer.global_step:
            progress.validate(trainer)
        if self.saved_step != trainer.global_step:
            self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where training was stopped by a signal, or by a step that was not finite, before its update."""
        at_boundary = isinstance(exception, CheckError) or getattr(exception, "at_boundary", False)
        if at_boundary and self.saved_step != trainer.global_step:
            self._save_last(trainer)

    def _periodic(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self.saved_step:
            return
        target = self.folder / f"step={step:07d}.ckpt"
        self._save(trainer, target)
        if trainer.is_global_zero:
            files.copy(target, self.folder / "last.ckpt")
            if self.keep_last is not None:
                periodic = [path for path in files.newest_first(self.folder) if path.name.startswith("step=")]
                for old in periodic[self.keep_last :]:
                    old.unlink()
        self.saved_step = step

    def _save_last(self, trainer: Trainer) -> None:
        self._save(trainer, self.folder / "last.ckpt")
        self.saved_step = trainer.global_step

    def _save(self, trainer: Trainer, target: Path) -> None:
        for logger in trainer.loggers:  # what was logged up to a checkpoint is on the disk before it
            logger.save()
        trainer.save_checkpoint(target)


class RandomState(Callback):
    """Keeps each rank's random state in the checkpoint, which Lightning's own checkpoints lack, and folds the rank in.

    Evaluation and sampling draw from generators of their own, so this state moves with training steps alone.

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
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states for the start of training."""
        self.saved = checkpoint["random_states"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this rank's state; a fresh run, or another number of ranks, seeds each rank differently."""
        if self.saved and len(self.saved) == trainer.world_size:
            _set_random_state(self.saved[trainer.global_rank])
        elif self.saved or trainer.world_size > 1:
            torch.manual_seed(self.seed + 1_000_003 * trainer.global_step + trainer.global_rank)


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state(legacy=True))
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


class StopSignals(Callback):
    """On SIGTERM or Ctrl-C, stops at the next step boundary; `Checkpoints` then saves. A second one stops at once.

    Lightning's own handler saves nothing, or saves inside the handler in the middle of a step, and exits 0 (Lightning
    issues 21406, 20542, 19916).
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signals over; one that comes before the first step stops after it."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            self.before[signum] = signal.signal(signum, self._receive)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them over once more: between the two, Lightning has put its own handler around ours."""
        for signum in self.before:
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise Stopped(signum)
        self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where a step has been finished."""
        if progress.step_finished(trainer, batch_idx):
            self._stop_if_received(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop inside an evaluation; the resumed run makes up for it."""
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            self._stop_if_received(trainer)

    def _stop_if_received(self, trainer: Trainer) -> None:
        received = self.received
        if trainer.world_size > 1:  # a signal may reach one rank alone: all stop, at the same step
            codes = torch.tensor(received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(codes, op=torch.distributed.ReduceOp.MAX)
            received = int(codes)
        if received:
            raise Stopped(received, at_boundary=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        while self.before:
            signal.signal(*self.before.popitem())


class FrozenHeap(Callback):
    """Keeps the garbage collector, while training goes on, from walking through all that was made before it.

    Autograd's many small objects set the collector off, and imported modules alone are a million objects: a sixth of a
    small network's step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect once, and leave alone what is there."""
        gc.collect()
        gc.freeze()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the collector look at it again."""
        gc.unfreeze()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let it look after an error too: Lightning tears no callback down then."""
        gc.unfreeze()


def keep_memory() -> bool:
    """Let the C library keep memory that tensors have left, rather than give it back and ask for it again.

    A page that comes back from the kernel costs more than an elementwise operation on it, and a CPU's training step
    frees and takes the same megabytes each time. Does nothing where the C library is not glibc.

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
    """Calls `keep_memory` when a training on a CPU begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let memory be kept."""
        if trainer.strategy.root_device.type == "cpu":
            keep_memory()


class Console(Callback):
    """Shows how training goes: a progress bar on a terminal, elsewhere a line for each logged step and evaluation.

    Args:
        stream: Where to; standard output by default, standard error where results are printed as JSON.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stdout
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained."""
        if not trainer.is_global_zero:
            return
        net: Any = pl_module.net
        count = sum(p.numel() for p in net.parameters())
        start = f"from step {trainer.global_step} " if trainer.global_step else ""
        self._line(
            f"{type(net).__name__} of {count:,} parameters, {net.vocab_size:,} symbols, context {net.block_size}: "
            f"training {start}to step {trainer.max_steps} on {trainer.world_size} x {trainer.strategy.root_device.type}"
        )
        if self.stream.isatty():
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self.bar = tqdm(total=total, initial=trainer.global_step, file=self.stream, unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; show the metrics of a step that was logged."""
        if not trainer.is_global_zero or not progress.step_finished(trainer, batch_idx):
            return
        metrics: Any = pl_module.metrics
        logged = metrics.get("step", 0) > trainer.global_step - progress.steps_per_call(trainer)
        if self.bar is not None:
            if logged:
                self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)
        elif logged:
            self._line(
                f"{self._step(trainer, metrics['step'])}  loss {metrics['loss']:.4f}  "
                f"lr {metrics['learning_rate']:.2e}  "
                f"norm {metrics['gradient_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the evaluation."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            values: Any = pl_module.validation
            self._line(
                f"{self._step(trainer, trainer.global_step)}  val_loss {values['loss']:.4f}  "
                f"perplexity {values['perplexity']:.2f}  bits per byte {values['bits_per_byte']:.4f}"
                + (f"  exact match {values['exact_match']:.4f}" if "exact_match" in values else "")
            )

    def _step(self, trainer: Trainer, step: int) -> str:
        return f"step {step:>{len(str(trainer.max_steps))}}/{trainer.max_steps}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
