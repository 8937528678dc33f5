"""TextData: one long text, served in chunks of block_size tokens."""

import shutil
import signal
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lm.data import store
from lm.data.chunks import EvalChunks, From, TrainChunks
from lm.data.tokenizers import Tokenizer
from lm.errors import UserError

EVAL_TOKENS = 8192  # in a batch of evaluation: large enough to be fast, small enough for logits of GPT-2's vocabulary


class TextData(LightningDataModule):
    """Text from a named corpus, a file or a folder.

    Training draws sequences at random offsets; evaluation covers the whole split once. Works without a Trainer too:
    then it is one process that does not accumulate.

    Args:
        corpus: python-docs (inside every Python), shakespeare, names, arithmetic, or the path of a text, JSON lines or
            Parquet file, or of a folder of them.
        tokenizer: char, gpt2, or the path of a .tiktoken file.
        block_size: Tokens in a sequence; the network's context.
        batch_size: Sequences per optimizer step, over all processes and accumulated micro-batches.
        val_fraction: Share of the text, before the test share, that validates.
        test_fraction: Share of the text, at its end, that tests; where it is 0, validation stands in for it.
        num_workers: Processes that prepare batches; memory-mapped tokens rarely need one.
        seed: Chooses the training sequences; set from seed_everything.
    """

    def __init__(
        self,
        *,
        corpus: str = "python-docs",
        tokenizer: str = "char",
        block_size: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        for name, size in {"block_size": block_size, "batch_size": batch_size}.items():
            if size < 1:
                raise UserError(f"data.{name} is {size}: it must be at least 1")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}: it must be at least 0")
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise UserError(
                f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing to train on"
                if val_fraction > 0 and test_fraction >= 0
                else f"data.val_fraction is {val_fraction}, data.test_fraction {test_fraction}: shares are above 0"
            )
        self.corpus, self.block_size, self.batch_size = corpus, block_size, batch_size
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer: str | Tokenizer = tokenizer
        self.val_split = "val"
        self.tokens: store.Tokens | None = None

    def prepare_data(self) -> None:
        """Tokenize the corpus, once per machine; later calls find the files."""
        self.tokens = store.load(
            self.corpus, self.tokenizer, val_fraction=self.val_fraction, test_fraction=self.test_fraction
        )

    def setup(self, stage: str) -> None:
        """Open the token files and check that they can be served.

        Raises:
            UserError: A split is too short, or the batch does not divide over ranks and micro-batches.
        """
        if self.tokens is None:
            self.prepare_data()
        assert self.tokens is not None
        self.tokenizer = self.tokens.tokenizer
        needed = self.block_size + 1
        for split in ("train", "val", "test") if self.test_fraction else ("train", "val"):
            found = len(self.tokens.splits[split])
            if found < needed:
                raise UserError(
                    f"corpus {self.corpus}: its {split} split has {found} tokens, block_size {self.block_size} needs "
                    f"{needed}: use a longer text, a smaller --data.init_args.block_size or another val_fraction"
                )
        _ = self.micro_batch_size
        world_size = self.trainer.world_size if self.trainer else 1
        chunks = (len(self.tokens.splits["val"]) - 1) // self.block_size
        if chunks < world_size:
            raise UserError(
                f"corpus {self.corpus}: its val split has {chunks} sequences for {world_size} processes: use a longer "
                "text, a larger val_fraction or fewer processes"
            )

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
        world_size, accumulate = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
        micro, rest = divmod(self.batch_size, world_size * accumulate)
        if rest or not micro:
            raise UserError(
                f"data.batch_size {self.batch_size} is not divisible by {world_size} processes x "
                f"{accumulate} accumulated batches = {world_size * accumulate}: change one of them"
            )
        return micro

    def micro_batches_done(self) -> int:
        """Return how many micro-batches each process has trained on: where the training data goes on."""
        return self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0

    def split_chunks(self, split: str) -> EvalChunks:
        """Return all chunks of a split, for evaluation; test is validation where there is no test split."""
        assert self.tokens is not None
        ids = self.tokens.splits[split if split != "test" or self.test_fraction else "val"]
        micro_batch_size = max(1, EVAL_TOKENS // self.block_size)
        return EvalChunks(ids, block_size=self.block_size, micro_batch_size=micro_batch_size, **self._place())

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches: endless, going on where training stands."""
        assert self.tokens is not None
        chunks = TrainChunks(
            self.tokens.splits["train"],
            block_size=self.block_size,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            **self._place(),
        )
        return self._loader(chunks, sampler=From(self.micro_batches_done))

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation split, or of the one that val_split names."""
        return self._loader(self.split_chunks(self.val_split))

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test split."""
        return self._loader(self.split_chunks("test"))

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer else {}

    def _loader(self, dataset: Dataset, **settings: Any) -> DataLoader:
        # items are whole batches; the own generator keeps the loader's hands off the global one, which dropout uses
        generator = torch.Generator().manual_seed(self.seed)
        if self.num_workers:
            self._check_shared_memory()
            settings |= {"persistent_workers": True, "worker_init_fn": _leave_signals_to_the_trainer}
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=generator,
            **settings,
        )

    def _check_shared_memory(self) -> None:
        needed = self.num_workers * 4 * self.micro_batch_size * (self.block_size + 1) * 8
        try:
            free = shutil.disk_usage("/dev/shm").free
        except OSError:
            return
        if free < needed:
            raise UserError(
                f"/dev/shm has {free >> 20} MiB free, data.num_workers {self.num_workers} needs {(needed >> 20) + 1}: "
                "set it to 0, or give the container more (--shm-size)"
            )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Let a signal to the whole process group stop the trainer, which then ends its workers, and not them first."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
