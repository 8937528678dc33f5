"""ChatData: conversations, of which the assistant's words alone are targets, and the end of its turn.

Shapes: B sequences, T block_size.
"""

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from lm.bounds import checked
from lm.corpus import conversations
from lm.data import splits
from lm.data.chunks import Batch, draw
from lm.data.evaluation_sets import EvaluationSet
from lm.data.module import IGNORED, TokenData, check_fractions
from lm.errors import UserError
from lm.tokenizers import Tokenizer, chat, make
from lm.tokenizers.templates import Messages

EVAL_TOKENS = 8192  # in an evaluation batch, as TextData's


class Encoded(NamedTuple):
    """A conversation."""

    ids: np.ndarray
    """int64 (n,), n at most T + 1."""
    written: np.ndarray
    """Which the assistant writes, bool (n,)."""


def note_left_out(data: TokenData, what: str, counts: dict[str, tuple[int, int]]) -> None:
    """Say how many texts are longer than the context.

    Args:
        data: Of which they are; it has a corpus.
        what: What they are.
        counts: Of each split, how many there are, and how many fit.

    Raises:
        UserError: None of a split fit.
    """
    every, kept = map(sum, zip(*counts.values(), strict=True))
    said = f"{every - kept} of {every} {what} are longer than data.block_size {data.block_size}"
    corpus = data.corpus  # type: ignore[attr-defined]
    if empty := [name for name, (there, fit) in counts.items() if there and not fit]:
        raise UserError(f"corpus {corpus}: {said}, all of the {empty[0]} split: make it larger")
    if kept < every:
        note(data, f"{said}: they are left out")


def note_repeated(data: TokenData, what: str, repeated: int) -> None:
    """Say how many texts, which are called `what`, repeat an earlier one."""
    if repeated:
        note(data, f"{repeated} {what} repeat an earlier one: each counts once")


def note(data: TokenData, text: str) -> None:
    """Print what is worth knowing of a corpus, on one rank."""
    if data._place()["rank"] == 0:
        print(f"note: corpus {data.corpus}: {text}", file=sys.stderr)  # type: ignore[attr-defined]


class ChatData(TokenData):
    """Conversations, a JSON object a line: messages of the roles system, user and assistant, or prompt and completion.

    The tokenizer gets special tokens, one that opens each role's turn and one that ends a turn, and the template that
    writes them, which checkpoints keep: `lm chat` and `lm serve` ask as was trained. Text never becomes one of them. A
    checkpoint's tokenizer (inherit) that came with another chat template keeps that one.
    Conversations longer than block_size are left out, and counted. Evaluation has one conversation in a sequence, and
    `exact_match` is the share of those in which every token of the assistant's is the likeliest.

    Args:
        corpus: conversations (generated: adding, reversing, capitals, counting), or the path of a JSON lines file.
        tokenizer: char, byte, gpt2, cl100k_base, o200k_base, the path of a .tiktoken file; or inherit, which takes a
            checkpoint's: that of --init_from.
        packed: Whether a training sequence holds as many conversations as fit, an end of text after each. The network
            must keep them apart: its document_end is that token.
        block_size: Tokens in a sequence; the network's context.
        batch_size: Sequences per optimizer step, over all processes and accumulated micro-batches.
        val_fraction: Share of the conversations for validation, before the test share.
        test_fraction: Share of the conversations for testing; if it is 0, validation stands in for it.
        num_workers: Processes that prepare batches.
        seed: Chooses the training sequences; set from seed_everything.
    """

    exact_match = True
    """Whether the share of conversations with entirely correct answers is measured."""

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        corpus: str = "conversations",
        tokenizer: str = "char",
        packed: bool = False,
        block_size: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_fractions(val_fraction, test_fraction)
        self.corpus, self.packed = corpus, packed
        self.tokenizer: str | Tokenizer = tokenizer  # or a checkpoint's own, set from outside
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.conversations: dict[str, list[Encoded]] = {}
        self.rows: list[list[Encoded]] = []
        """The training sequences: the conversations in each."""

    def setup(self, stage: str) -> None:
        """Read, split and encode the conversations.

        Raises:
            UserError: A line is no conversation, the vocabulary lacks a symbol, or the context holds none of a split.
        """
        _ = self.micro_batch_size
        if self.rows:
            return
        found = conversations.read(self.corpus)
        parts = splits.shuffled(self.corpus, found, self.val_fraction, self.test_fraction)
        self.tokenizer = with_turns(self.tokenizer, found)
        encoded = {
            name: [Encoded(*one) for one in chat.encode_all(self.tokenizer, part)] for name, part in parts.items()
        }
        self.conversations = {
            name: [one for one in part if len(one.ids) <= self.block_size + 1] for name, part in encoded.items()
        }
        counts = {name: (len(part), len(self.conversations[name])) for name, part in encoded.items()}
        note_left_out(self, "conversations", counts)
        train = self.conversations["train"]
        self.rows = packed(train, self.block_size) if self.packed else [[one] for one in train]

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that draws training sequences with replacement."""

        def examples(first: int, count: int) -> Batch:
            chosen = draw(self.seed, first, count, len(self.rows)).tolist()
            return sequences([self.rows[i] for i in chosen], self.block_size, self.text_tokenizer)

        return examples

    def eval_dataset(self, split: str) -> EvaluationSet:
        """Return all conversations of a split, each a sequence; test is validation where there is no test split."""
        part = self.conversations[split if split != "test" or self.test_fraction else "val"]

        def between(start: int, stop: int) -> Batch:
            return sequences([[one] for one in part[start:stop]], self.block_size, self.text_tokenizer)

        size = max(1, EVAL_TOKENS // self.block_size)
        return EvaluationSet(between, len(part), batch_size=size, **self._place())


def with_turns(tokenizer: str | Tokenizer, found: Iterable[Messages]) -> Tokenizer:
    """Return a tokenizer, or the one of that name, with the special tokens of conversations.

    Args:
        tokenizer: It, or its name.
        found: The conversations: `char` knows their symbols.
    """
    if isinstance(tokenizer, Tokenizer):
        return chat.for_chat(tokenizer)
    texts = (message["content"] for one in found for message in one)
    return chat.for_chat(make(tokenizer, lambda: {symbol for text in texts for symbol in text}))


def sequences(rows: list[list[Encoded]], block_size: int, tokenizer: Tokenizer) -> Batch:
    """Return the tokens and targets, both (B, T), of rows of conversations, an end of text after each."""
    ids = np.full((len(rows), block_size + 1), tokenizer.eot)  # (B, T + 1)
    targets = np.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        at = 0
        for one in row:
            place = slice(at, at + len(one.ids))
            ids[i, place] = one.ids
            targets[i, place] = np.where(one.written, one.ids, IGNORED)
            at += len(one.ids) + 1  # nobody predicts the end of text
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets[:, 1:])


def packed(encoded: list[Encoded], block_size: int) -> list[list[Encoded]]:
    """Return rows of conversations, in order, each with as many as fit in with an end of text between them."""
    rows, free = list[list[Encoded]](), 0
    for one in encoded:
        if len(one.ids) + 1 > free:
            rows.append([])
            free = block_size + 2  # the last end of text need not fit in
        rows[-1].append(one)
        free -= len(one.ids) + 1
    return rows
