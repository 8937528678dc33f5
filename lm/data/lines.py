"""LinesData: one document per line, such as names, each ended by a mark that the network learns to write.

Shapes: N examples, T block_size.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch

from lm.bounds import checked
from lm.corpus import sources
from lm.data import splits
from lm.data.chunks import Batch, random_rows
from lm.data.evaluation_sets import EvaluationSet, of_rows
from lm.data.module import IGNORED, TokenData, check_fractions
from lm.errors import UserError
from lm.tokenizers import CharTokenizer, Tokenizer

EVAL_TOKENS = 1 << 16


class LinesData(TokenData):
    """Documents from a named corpus or a text file, one per line, tokenized by characters.

    The split is by lines: shuffled with a fixed seed, then cut into train, validation and test.

    Args:
        corpus: names (downloaded once), or the path of a text file.
        targets: last serves each symbol as an example of its own, with the block_size symbols before it, for networks
            of fixed context; all serves each line once, with all of its symbols as targets.
        end: The end mark, one character that no line contains: it ends each line, and pads the context before it.
        block_size: Tokens in a sequence; the network's context.
        batch_size: Sequences per optimizer step, over all processes and accumulated micro-batches.
        val_fraction: Share of the lines for validation, before the test share.
        test_fraction: Share of the lines for testing.
        num_workers: Processes that prepare batches; indexing tensors rarely needs one.
        seed: Chooses the training sequences; set from seed_everything.
    """

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        corpus: str = "names",
        targets: Literal["last", "all"] = "last",
        end: str = ".",
        block_size: int = 8,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        if len(end) != 1 or end == "\n":
            raise UserError(f"data.end is {end!r}: it must be one character that is no line end")
        check_fractions(val_fraction, test_fraction)
        self.corpus, self.targets, self.end = corpus, targets, end
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.examples: dict[str, Batch] = {}

    def prepare_data(self) -> None:
        """Download a named corpus; report files of a folder that are left out."""
        sources.find(self.corpus)
        if note := sources.left_out(self.corpus):
            print(note, file=sys.stderr)

    def setup(self, stage: str) -> None:
        """Read, split and encode the lines.

        Raises:
            UserError: There are too few different lines, or one is too long, or contains the end mark or a symbol
                that the vocabulary lacks.
        """
        _ = self.micro_batch_size
        if self.examples:
            return
        parts = self._split()
        if not isinstance(self.tokenizer, Tokenizer):
            symbols = {symbol for lines in parts.values() for line in lines for symbol in line}
            if self.end in symbols:
                raise UserError(f"corpus {self.corpus}: a line contains the end mark {self.end!r}: set data.end")
            self.tokenizer = CharTokenizer(symbols, end=self.end)
        make = self._windows if self.targets == "last" else self._whole
        self.examples = {name: make(lines) for name, lines in parts.items()}

    def _split(self) -> dict[str, list[str]]:
        lines = sources.find(self.corpus).read().splitlines()
        lines = [line for line in lines if line]
        if not lines:
            raise UserError(f"corpus {self.corpus}: it has no lines")
        if len(set(lines)) < 3:
            raise UserError(
                f"corpus {self.corpus}: its {len(lines)} lines are {len(set(lines))} different one(s): training, "
                "validation and test need different lines"
            )
        return splits.shuffled(self.corpus, lines, self.val_fraction, self.test_fraction)

    def _windows(self, lines: list[str]) -> Batch:
        """Return every symbol and end mark (N,) with the block_size symbols before it in its line (N, T)."""
        T = self.block_size  # noqa: N806
        ids = torch.from_numpy(self.text_tokenizer.encode("".join(self.end * T + line + self.end for line in lines)))
        # none of the T marks before a line is a target
        shown = np.concatenate([[False] * T + [True] * (len(line) + 1) for line in lines] or [[]]).astype(bool)
        places = torch.from_numpy(shown).nonzero().squeeze(1)  # (N,): where the targets are
        before = torch.arange(-T, 0)  # (T,)
        return ids[places.unsqueeze(1) + before], ids[places]  # (N, T), (N,)

    def _whole(self, lines: list[str]) -> Batch:
        """Return each line after a mark (N, T), and its targets: the line and a mark, the rest ignored (N, T)."""
        T, mark = self.block_size, self.text_tokenizer.eot  # noqa: N806
        longest = max(lines, key=len, default="")
        if len(longest) + 1 > T:
            raise UserError(
                f"corpus {self.corpus}: the line {longest[:40]!r} and its mark need {len(longest) + 1} tokens, "
                f"data.block_size is {T}: make it larger, or say data.targets last"
            )
        assert mark is not None
        tokens, targets = torch.full((len(lines), T), mark), torch.full((len(lines), T), IGNORED)
        for row, line in enumerate(lines):
            ids = torch.from_numpy(self.text_tokenizer.encode(line))
            tokens[row, 1 : len(ids) + 1] = ids
            targets[row, : len(ids)] = ids
            targets[row, len(ids)] = mark
        return tokens, targets

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that draws rows of the training split with replacement."""
        tokens, targets = self.examples["train"]
        return partial(random_rows, tokens, targets, self.seed)

    def eval_dataset(self, split: str) -> EvaluationSet:
        """Return all examples of a split once; test is validation where there is no test split."""
        tokens, targets = self.examples[split if split != "test" or self.test_fraction else "val"]
        return of_rows(tokens, targets, batch_size=max(1, EVAL_TOKENS // self.block_size), **self._place())
