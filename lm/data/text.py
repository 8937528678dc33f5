"""TextData: one long text, served in chunks of block_size tokens."""

from collections.abc import Callable
from functools import partial

from lm.data import store
from lm.data.chunks import Batch, EvalChunks, random_chunks
from lm.data.module import TokenData
from lm.errors import UserError

EVAL_TOKENS = 8192  # in a batch of evaluation: large enough to be fast, small enough for logits of GPT-2's vocabulary


class TextData(TokenData):
    """Text from a named corpus, a file or a folder.

    Training draws sequences at random offsets; evaluation covers the whole split once.

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
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise UserError(
                f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing to train on"
                if val_fraction > 0 and test_fraction >= 0
                else f"data.val_fraction is {val_fraction}, data.test_fraction {test_fraction}: shares are above 0"
            )
        self.corpus, self.tokenizer = corpus, tokenizer
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
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

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return what gives chunks of the training split at random offsets."""
        assert self.tokens is not None
        return partial(random_chunks, self.tokens.splits["train"], self.block_size, self.seed)

    def eval_dataset(self, split: str) -> EvalChunks:
        """Return all chunks of a split, for evaluation; test is validation where there is no test split."""
        assert self.tokens is not None
        ids = self.tokens.splits[split if split != "test" or self.test_fraction else "val"]
        micro_batch_size = max(1, EVAL_TOKENS // self.block_size)
        return EvalChunks(ids, block_size=self.block_size, micro_batch_size=micro_batch_size, **self._place())
