"""PairData: pairs of answers to a prompt, of which one is preferred.

Shapes: B pairs, T block_size.
"""

from collections.abc import Callable

import torch

from lm.bounds import checked
from lm.corpus import conversations
from lm.data import splits
from lm.data.chat import EVAL_TOKENS, Encoded, note_left_out, sequences, with_turns
from lm.data.chunks import Batch, draw
from lm.data.evaluation_sets import EvaluationSet
from lm.data.module import TokenData, check_fractions
from lm.errors import UserError
from lm.tokenizers import Tokenizer, chat

Pair = tuple[Encoded, Encoded]


class PairData(TokenData):
    """Pairs of answers, a JSON object a line: prompt, chosen, rejected.

    A batch is tokens and targets, both (B, 2, T), the chosen answer first, and the pairs' numbers (B,). Prompts and
    answers are written as conversations, as `lm.data.ChatData` does; the answer and its end are targets. Pairs with a
    text longer than block_size are left out, and counted.

    Args:
        corpus: preferences (generated: made-up names), or the path of a JSON lines file.
        tokenizer: char, byte, gpt2, cl100k_base, o200k_base, the path of a .tiktoken file; or inherit, which takes a
            checkpoint's: that of --init_from.
        block_size: Tokens in a text; the network's context.
        batch_size: Pairs per optimizer step, over all processes and accumulated micro-batches.
        val_fraction: Share of the pairs for validation, before the test share.
        test_fraction: Share of the pairs for testing; if it is 0, validation stands in for it.
        num_workers: Processes that prepare batches.
        seed: Chooses the training pairs; set from seed_everything.
    """

    gives = "pairs"

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        corpus: str = "preferences",
        tokenizer: str = "char",
        block_size: int = 64,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions(val_fraction, test_fraction)
        self.corpus = corpus
        self.tokenizer: str | Tokenizer = tokenizer  # or a checkpoint's own, set from outside
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.pairs: list[Pair] = []
        """Of all splits; a pair's number is its place."""
        self.spans: dict[str, tuple[int, int]] = {}
        """Where a split's pairs begin, and how many there are."""

    def setup(self, stage: str) -> None:
        """Read, split and encode the pairs.

        Raises:
            UserError: A line is no pair, the vocabulary lacks a symbol, or the context holds none of a split.
        """
        _ = self.micro_batch_size
        if self.pairs:
            return
        found = conversations.read_pairs(self.corpus)
        self.tokenizer = with_turns(self.tokenizer, (one for pair in found for one in pair))
        parts = splits.shuffled(self.corpus, found, self.val_fraction, self.test_fraction)
        for name, part in parts.items():
            texts = chat.encode_all(self.tokenizer, (messages for pair in part for messages in pair))
            encoded = [(Encoded(*one), Encoded(*next(texts))) for one in texts]
            kept = [pair for pair in encoded if max(len(one.ids) for one in pair) <= self.block_size]
            self.spans[name] = len(self.pairs), len(kept)
            self.pairs += kept
        counts = {name: (len(part), self.spans[name][1]) for name, part in parts.items()}
        note_left_out(self, "pairs", counts)

    def batch(self, numbers: list[int]) -> Batch:
        """Return the tokens and targets of pairs, both (B, 2, T), and their numbers (B,)."""
        rows = [[one] for number in numbers for one in self.pairs[number]]
        tokens, targets = sequences(rows, self.block_size, self.text_tokenizer)  # (2 B, T)
        return tokens.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2)), torch.tensor(numbers)

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that draws training pairs with replacement."""
        start, size = self.spans["train"]
        return lambda first, count: self.batch((start + draw(self.seed, first, count, size)).tolist())

    def eval_dataset(self, split: str) -> EvaluationSet:
        """Return all pairs of a split; test is validation where there is no test split."""
        start, size = self.spans[split if split != "test" or self.test_fraction else "val"]

        def between(first: int, stop: int) -> Batch:
            return self.batch(list(range(start + first, start + stop)))

        return EvaluationSet(between, size, batch_size=max(1, EVAL_TOKENS // 2 // self.block_size), **self._place())
