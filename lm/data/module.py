"""TokenData: what all LightningDataModules here share: the global batch, its division, loaders that can resume."""

import atexit
import multiprocessing
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lm.bounds import checked
from lm.data.chunks import IGNORED as IGNORED
from lm.data.chunks import Batch, From, Stream, rows
from lm.errors import UserError, take_stops
from lm.tokenizers import Tokenizer


class Rank(TypedDict):
    """This process's rank, and the number of processes."""

    rank: int
    world_size: int


class TokenData(LightningDataModule, ABC):
    """Serves batches of (tokens, targets); training is endless, and resumes after the sequences it has consumed.

    The batch of a step is sequences n … n + batch_size - 1 in an order that the seed fixes, where n is the number of
    sequences in earlier steps: step × batch_size, unless part of the run had another batch size.

    Works without a Trainer too, as one process without gradient accumulation.

    Args:
        block_size: Tokens in a sequence; the network's context.
        batch_size: Sequences per optimizer step, over all processes and accumulated micro-batches.
        num_workers: Processes that prepare batches.
        seed: Chooses the training sequences.
    """

    gives = "texts"
    """What a batch has: texts, or pairs of texts."""
    writes = True
    """Whether a network that learns from it writes text."""

    @checked("data.", UserError)
    def __init__(self, *, block_size: int, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.block_size, self.batch_size = block_size, batch_size
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer: str | Tokenizer = ""
        self.val_split = "val"
        self._shift = 0  # sequences consumed beyond step × batch_size

    @abstractmethod
    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that gives training examples first … first + count - 1, from (first, count).

        Its result depends only on the seed and the numbers.
        """

    @abstractmethod
    def eval_dataset(self, split: str) -> Dataset[Batch]:
        """Return this process's share of the batches that cover a split (train, val or test) once."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; known after `setup`."""
        return self.text_tokenizer.n_vocab

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer; known after `setup`."""
        if isinstance(self.tokenizer, str):
            raise RuntimeError("the tokenizer is known after setup()")
        return self.tokenizer

    @property
    def micro_batch_size(self) -> int:
        """Sequences that one process trains on at a time.

        Raises:
            UserError: The global batch does not divide.
        """
        trainer = self.trainer
        return self.divided(*(trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1))

    def divided(self, world_size: int, accumulate: int) -> int:
        """Return the sequences of a micro-batch; raises UserError where the global batch does not divide."""
        micro, rest = divmod(self.batch_size, world_size * accumulate)
        if rest or not micro:
            raise UserError(
                f"data.batch_size {self.batch_size} is not divisible by {world_size} processes x "
                f"{accumulate} accumulated batches = {world_size * accumulate}: change one of them"
            )
        return micro

    @property
    def steps_per_call(self) -> int:
        """Optimizer steps in a training batch: as many as the module takes at a time."""
        module = self.trainer.lightning_module if self.trainer else None
        return getattr(module, "steps_per_call", 1)

    def items_done(self) -> int:
        """Return how many training batches each process has finished: where the training data resumes."""
        if not self.trainer:
            return 0
        return self.trainer.global_step * self.trainer.accumulate_grad_batches // self.steps_per_call

    def sequences(self, step: int) -> int:
        """Return how many sequences the run has consumed after so many steps."""
        return step * self.batch_size + self._shift

    def go_on(self, step: int, sequences: int) -> None:
        """Resume training after a step by which so many sequences were consumed, at whatever batch size."""
        self._shift = sequences - step * self.batch_size

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Return the tokens and targets that training begins with, as `rows`."""
        return rows(self.train_dataset(1)[0])

    def train_dataset(self, steps: int = 1) -> Stream:
        """Return this process's training batches, so many steps per item."""
        size, shift = self.micro_batch_size, self._shift
        return Stream(self.training_examples(), micro_batch_size=size, steps=steps, shift=shift, **self._place())

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches: endless, from where training stands."""
        return self._loader(self.train_dataset(self.steps_per_call), sampler=From(self.items_done))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the validation split, or of the one that val_split names."""
        return self._loader(self.eval_dataset(self.val_split))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test split."""
        return self._loader(self.eval_dataset("test"))

    def _place(self) -> Rank:
        trainer = self.trainer
        return Rank(rank=trainer.global_rank if trainer else 0, world_size=trainer.world_size if trainer else 1)

    def _loader(self, dataset: Dataset[Batch], **settings: Any) -> DataLoader[Batch]:
        # items are whole batches; with a generator of its own the loader leaves dropout's, the global one, alone
        generator = torch.Generator().manual_seed(self.seed)
        if self.num_workers:
            self._check_shared_memory()
            settings |= {"persistent_workers": True, "worker_init_fn": _leave_signals_to_the_trainer}
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=generator,
            **settings,
        )

    def _check_shared_memory(self) -> None:
        # tokens and targets, in whole pages, of the batches that each worker prefetches, in training and evaluation
        tensor = self.micro_batch_size * self.steps_per_call * (self.block_size + 1) * 8 + 4096
        needed = max(1 << 20, self.num_workers * 2 * 2 * 2 * tensor)
        try:
            free = shutil.disk_usage("/dev/shm").free
        except OSError:
            return
        if free < needed:
            raise UserError(
                f"/dev/shm has {free >> 20} MiB free, data.num_workers {self.num_workers} needs {(needed >> 20) + 1}: "
                "set it to 0, or give the container more (docker run --shm-size)"
            )


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise UserError where validation and test take all of a text."""
    if val_fraction + test_fraction >= 1:
        raise UserError(
            f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing to train on"
        )


def _end_workers() -> None:
    """Kill the workers that are left when this process exits: they ignore SIGTERM, so it would wait forever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore stop signals in a worker: one to the whole process group stops the trainer, which ends its workers."""
    take_stops(signal.SIG_IGN)
