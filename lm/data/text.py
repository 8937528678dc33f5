"""TextData: text, or prepared corpora of any size, served in chunks of block_size tokens."""

from collections.abc import Callable
from functools import partial

from lm.bounds import checked
from lm.corpus import shards, token_cache
from lm.data import evaluation_sets
from lm.data.chunks import Batch, Sliced
from lm.data.evaluation_sets import EvaluationSet
from lm.data.examples import Documents, Examples, Mixture, Order, Running, numbered
from lm.data.module import TokenData, check_fractions
from lm.errors import UserError
from lm.tokenizers import Tokenizer

EVAL_TOKENS = 8192  # in an evaluation batch: large enough to be fast, small enough for logits of GPT-2's vocabulary


class TextData(TokenData):
    """Text from a named corpus, a file or a folder, or corpora that `lm prepare` made.

    Evaluation covers the whole split once; of several corpora, all their splits.

    Args:
        corpus: python-docs (inside every Python), shakespeare, names, arithmetic, the path of a text, JSON lines or
            Parquet file, or of a folder of them; or the folder or URL of a prepared corpus; or several of all these,
            each with its weight.
        tokenizer: char, byte, gpt2, cl100k_base, o200k_base, or the path of a .tiktoken file; by default a prepared
            corpus' own, and char for a text.
        block_size: Tokens in a sequence; the network's context.
        batch_size: Sequences per optimizer step, over all processes and accumulated micro-batches.
        val_fraction: Share of a text for validation, before the test share; a prepared corpus has its own splits.
        test_fraction: Share of a text for testing, at its end; if it is 0, validation stands in for it.
        order: random draws sequences with replacement; permutation serves each chunk once per epoch.
        across_documents: Whether a sequence may continue into the next document. If not, the padding after a short
            document is ignored as a target.
        num_workers: Processes that prepare batches; tokens on a disk rarely need one.
        seed: Chooses the training sequences; set from seed_everything.
    """

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        corpus: str | dict[str, float] = "python-docs",
        tokenizer: str | None = None,
        block_size: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        order: Order = "random",
        across_documents: bool = True,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions(val_fraction, test_fraction)
        self.weights = corpus if isinstance(corpus, dict) else {corpus: 1.0}
        if not self.weights:
            raise UserError("data.corpus: it names none")
        self.corpus = " + ".join(self.weights)
        self.order, self.across_documents = order, across_documents
        self.tokenizer: str | Tokenizer = tokenizer or ""  # or a checkpoint's own, set from outside
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.corpora: list[shards.Corpus] = []

    def prepare_data(self) -> None:
        """Tokenize the corpora that are text, once per machine; later calls find the files."""
        shares = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        self.corpora = [token_cache.load_tokens(corpus, self.tokenizer or None, **shares) for corpus in self.weights]

    def setup(self, stage: str) -> None:
        """Open the token files and check that they can be served.

        Raises:
            UserError: A split is too short, the corpora have different tokenizers, or the batch does not divide over
                ranks and micro-batches.
        """
        if not self.corpora:
            self.prepare_data()
        first, *others = self.corpora
        for name, other in zip(list(self.weights)[1:], others, strict=True):
            if other.tokenizer.state() != first.tokenizer.state():
                raise UserError(f"data.corpus: {name} has another tokenizer than {next(iter(self.weights))}")
        self.tokenizer = first.tokenizer
        for corpus, opened in zip(self.weights, self.corpora, strict=True):
            for split in ("train", "val", "test") if self.test_fraction else ("train", "val"):
                self._check_length(corpus, split, len(opened.splits[split]), prepared="plan" in opened.manifest)
        _ = self.micro_batch_size

    def _check_length(self, corpus: str, split: str, found: int, *, prepared: bool) -> None:
        needed = self.block_size + 1 if self.across_documents else 2
        if found < needed:
            share = f"prepare it with a larger share for {split}" if prepared else "another data.val_fraction"
            raise UserError(
                f"corpus {corpus}: its {split} split has {found} tokens, block_size {self.block_size} needs "
                f"{needed}: use a longer text, a smaller data.block_size, or {share}"
            )

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that gives training sequences by number."""
        parts = [self._examples(corpus.splits["train"], self.seed + k) for k, corpus in enumerate(self.corpora)]
        if len(parts) == 1:
            return partial(numbered, parts[0])
        return partial(numbered, Mixture(parts, list(self.weights.values()), self.seed))

    def _examples(self, tokens: shards.Tokens, seed: int) -> Examples:
        held = shards.in_memory(tokens)
        if self.across_documents:
            return Running(held, self.block_size, self.order, seed)
        return self._documents(tokens, held, self.order, seed)

    def _documents(self, tokens: shards.Tokens, held: Sliced, order: Order, seed: int) -> Documents:
        documents = Documents(tokens, held, self.block_size, order, seed)
        if not len(documents):
            raise UserError(
                f"corpus {self.corpus}: a split has no document of two tokens: set data.across_documents to true"
            )
        return documents

    def eval_dataset(self, split: str) -> EvaluationSet:
        """Return all chunks of a split, for evaluation; test is validation where there is no test split."""
        if split == "test" and not all(len(corpus.splits["test"]) > 1 for corpus in self.corpora):
            split = "val"
        tokens = shards.concatenated(corpus.splits[split] for corpus in self.corpora)
        held, batch_size = shards.in_memory(tokens), max(1, EVAL_TOKENS // self.block_size)
        if self.across_documents:
            return evaluation_sets.of_chunks(held, block_size=self.block_size, batch_size=batch_size, **self._place())
        documents = self._documents(tokens, held, "permutation", self.seed)
        return EvaluationSet(documents.between, len(documents), batch_size=batch_size, **self._place())
