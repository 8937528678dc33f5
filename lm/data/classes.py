"""ClassData: texts and their classes, from a file of a label and a text a line.

Shapes: N texts, T block_size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lm.bounds import checked
from lm.corpus import columns
from lm.data import splits
from lm.data.chat import EVAL_TOKENS, note_left_out, note_repeated
from lm.data.chunks import Batch, random_rows
from lm.data.evaluation_sets import EvaluationSet, of_rows
from lm.data.module import TokenData, check_fractions
from lm.errors import UserError
from lm.tokenizers import CharTokenizer, Tokenizer

NAMES = ("label", "text")
PAD = "\x03"
"""What fills a row after its text: ASCII's end of text. Its id is 0, whatever the texts are: Encoder's pad_token."""


class ClassData(TokenData):
    """A label and a text a line, tab-separated or as JSON lines; a text has one target, its class.

    Characters are tokens, and so are the labels, after them, which no text becomes. Texts that are longer than
    block_size are left out, and counted; equal lines count once, and a text with two labels is refused. The share of
    texts whose class is the likeliest is `accuracy`.

    Args:
        corpus: reviews (generated), or the path of a file: label, a tab, text; or JSON lines with label and text.
        block_size: Tokens in a text; the network's context.
        batch_size: Texts per optimizer step, over all processes and accumulated micro-batches.
        val_fraction: Share of the texts for validation, before the test share.
        test_fraction: Share of the texts for testing; if it is 0, validation stands in for it.
        num_workers: Processes that prepare batches.
        seed: Chooses the training texts; set from seed_everything.
    """

    exact_match = True
    """Whether the share of right predictions is measured."""
    share_right = "accuracy"
    """What it is called."""
    writes = False

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        corpus: str = "reviews",
        block_size: int = 64,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions(val_fraction, test_fraction)
        self.corpus = corpus
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.examples: dict[str, Batch] = {}

    def setup(self, stage: str) -> None:
        """Read, split and encode the texts.

        Raises:
            UserError: A line has not both label and text, or another label than an equal text has; there are fewer than
                two labels, the checkpoint's vocabulary lacks one, or the context holds no text of a split.
        """
        _ = self.micro_batch_size
        if self.examples:
            return
        rows, repeated = columns.read(self.corpus, NAMES, given=1)
        note_repeated(self, "lines", repeated)
        labels = sorted({row.first for row in rows})
        if len(labels) < 2:
            raise UserError(f"corpus {self.corpus}: all lines have the label {labels[0]!r}: expected two or more")
        for row in rows:
            if PAD in row.second:
                raise UserError(f"{row.place}: it has the control character 3, which pads texts here: take it out")
        if not isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = CharTokenizer({symbol for row in rows for symbol in row.second}, end=PAD, special=labels)
        if unknown := [label for label in labels if label not in classes(self.tokenizer)]:
            raise UserError(
                f"corpus {self.corpus}: its label {unknown[0]!r} is none of the checkpoint's classes "
                f"{', '.join(classes(self.tokenizer))}"
            )
        parts = splits.shuffled(self.corpus, rows, self.val_fraction, self.test_fraction)
        kept = {name: [row for row in part if len(row.second) <= self.block_size] for name, part in parts.items()}
        note_left_out(self, "texts", {name: (len(part), len(kept[name])) for name, part in parts.items()})
        self.examples = {name: self._encoded(part) for name, part in kept.items()}

    def _encoded(self, rows: list[columns.Row]) -> Batch:
        """Return texts (N, T) and their classes (N,)."""
        ids = classes(self.text_tokenizer)
        tokens = encoded(self.text_tokenizer, [row.second for row in rows], self.block_size)
        return tokens, torch.tensor([ids[row.first] for row in rows], dtype=torch.int64)

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that draws texts of the training split with replacement."""
        tokens, targets = self.examples["train"]
        return partial(random_rows, tokens, targets, self.seed)

    def eval_dataset(self, split: str) -> EvaluationSet:
        """Return all texts of a split once; test is validation where there is no test split."""
        tokens, targets = self.examples[split if split != "test" or self.test_fraction else "val"]
        return of_rows(tokens, targets, batch_size=max(1, EVAL_TOKENS // self.block_size), **self._place())


def encoded(tokenizer: Tokenizer, texts: Sequence[str], block_size: int) -> Tensor:
    """Return texts as networks read them in training and ever after, int64 (N, T), each filled up with the mark.

    Raises:
        UserError: The vocabulary lacks a symbol.
    """
    padded = "".join(text.ljust(block_size, PAD) for text in texts)
    return torch.from_numpy(tokenizer.encode(padded)).view(-1, block_size)  # (N T) -> (N, T)


def classes(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the classes that a tokenizer knows, and their ids."""
    return tokenizer.special_ids
