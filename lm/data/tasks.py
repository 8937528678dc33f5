"""Tasks generated on the fly: problems whose answers can be checked, such as strings to reverse.

Shapes: B sequences, T block_size.
"""

from abc import abstractmethod
from argparse import ArgumentError
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser

from lm.bounds import checked
from lm.data.chunks import Batch, draw
from lm.data.evaluation_sets import EvaluationSet, of_rows
from lm.data.examples import permuted
from lm.data.module import IGNORED, TokenData
from lm.errors import UserError
from lm.tokenizers import CharTokenizer

END = "."
EVAL_ROWS = 1000


class TaskData(TokenData):
    """Numbered problems: validation and test hold some out, training draws from the others.

    A sequence is the end mark, the problem, its answer, the end mark. Only the answer and its end mark are targets.

    Args:
        block_size: Tokens in a sequence; at least as many as the longest problem, its answer and a mark.
        batch_size: Problems per optimizer step, over all processes and accumulated micro-batches.
        held_out: Problems for validation, and as many others for testing; training never draws one of them.
        train_problems: How many of the others training draws from, the same ones for every seed; None for all.
        num_workers: Processes that prepare batches.
        seed: Chooses the training problems; set from seed_everything.
    """

    exact_match = True
    """Whether the share of problems with an entirely correct answer is measured."""
    end = END
    """The mark, one character that no problem contains: it stands before a problem, and ends its answer."""

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        block_size: int,
        batch_size: int,
        held_out: int,
        train_problems: int | None = None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(block_size=block_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.held_out, self.train_problems = held_out, train_problems
        self.test_fraction = 1.0  # there is a test split

    @property
    @abstractmethod
    def symbols(self) -> str:
        """All characters of problems and answers."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many problems there are."""

    @abstractmethod
    def example(self, index: int) -> tuple[str, str]:
        """Return problem number index, which ends with the sign that asks for the answer, and the answer.

        No two numbers give the same text, so training never sees a held-out problem under another number.
        """

    @abstractmethod
    def longest(self) -> tuple[str, str]:
        """Return a problem and answer that are together as long as any."""

    @abstractmethod
    def question(self, prompt: str) -> tuple[str, str]:
        """Return a problem as people write it, up to its sign, and as the network was trained to read it.

        Raises:
            UserError: The prompt is not such a problem; the message shows the form.
        """

    def kind(self, problem: str) -> str:
        """Return under what a problem is counted in a table of how many are right."""
        return "all"

    def result(self, answer: str) -> str:
        """Return the part of an answer that says whether it is right: what follows the steps, where there are any."""
        return answer

    def readable(self, answer: str) -> str:
        """Return an answer's result as people write it."""
        return self.result(answer)

    def readable_steps(self, answer: str) -> str:
        """Return a whole answer as people write it."""
        return answer

    def setup(self, stage: str) -> None:
        """Check that the problems fit.

        Raises:
            UserError: There are too few problems, or the context does not hold the longest.
        """
        _ = self.micro_batch_size
        if not 0 < self.held_out * 2 < self.size:
            raise UserError(
                f"data.held_out {self.held_out} for validation and as many for test leave none to train on: there are "
                f"{self.size:,} problems"
            )
        if self.train_problems is not None and self.train_problems > (left := self.size - 2 * self.held_out):
            raise UserError(f"data.train_problems {self.train_problems} is more than there are: say {left:,} at most")
        problem, answer = self.longest()
        needed = len(problem) + len(answer) + 1
        if needed > self.block_size:
            raise UserError(
                f"data.block_size {self.block_size} does not hold {problem}{answer} and a mark: it needs {needed}: "
                "make it larger, or the problems smaller"
            )
        self.tokenizer = CharTokenizer(self.symbols, end=self.end)

    @cached_property
    def _held(self) -> np.ndarray:
        """Numbers of the problems held out (2 × held_out,), in a fixed random order: the split is the task's own."""
        chosen = np.random.default_rng(0).choice(self.size, 2 * self.held_out, replace=False, shuffle=True)
        return chosen.astype(np.int64)

    @cached_property
    def _gaps(self) -> np.ndarray:
        return np.sort(self._held) - np.arange(len(self._held))

    def problems(self, first: int, count: int) -> np.ndarray:
        """Return the problem numbers (count,) of training examples from first on: a pure function of (seed, first)."""
        left = self.size - len(self._held)
        if self.train_problems is None:
            rank = draw(self.seed, first, count, left)  # among those that are not held out
        else:  # the first so many of a fixed random order
            rank = permuted(0, draw(self.seed, first, count, self.train_problems), left)[1]
        return rank + np.searchsorted(self._gaps, rank, side="right")

    def batch(self, indices: np.ndarray) -> Batch:
        """Return tokens and targets, both (B, T), of problems."""
        T = self.block_size  # noqa: N806
        examples = [self.example(int(i)) for i in indices]
        rows = [(self.end + problem + answer).ljust(T + 1, self.end) for problem, answer in examples]
        ids = torch.from_numpy(self.text_tokenizer.encode("".join(rows))).view(-1, T + 1)  # (B T + B,) -> (B, T + 1)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].clone()
        first = torch.tensor([len(problem) for problem, _ in examples]).unsqueeze(1)  # (B, 1): the answer begins there
        end = first + torch.tensor([len(answer) for _, answer in examples]).unsqueeze(1)  # the mark after it
        place = torch.arange(T)  # (T,)
        targets[(place < first) | (place > end)] = IGNORED
        return tokens, targets

    def training_examples(self) -> Callable[[int, int], Batch]:
        """Return a function that makes the training problems."""
        return lambda first, count: self.batch(self.problems(first, count))

    def held_out_examples(self, split: str) -> list[tuple[str, str]]:
        """Return the problems held out, val or test, and their answers; for train, as many that are not."""
        return [self.example(int(i)) for i in self._numbers(split)]

    def _numbers(self, split: str) -> np.ndarray:
        n = self.held_out
        return {"val": self._held[:n], "test": self._held[n:], "train": self.problems(0, n)}[split]

    def eval_dataset(self, split: str) -> EvaluationSet:
        """Return the problems held out; for train, as many that are not."""
        tokens, targets = self.batch(self._numbers(split))
        return of_rows(tokens, targets, batch_size=EVAL_ROWS, **self._place())


class ReverseData(TaskData):
    """Strings to be written backwards: `abcd>dcba`.

    Args:
        alphabet: Letters of the strings.
        shortest_length: Fewest letters in a string.
        longest_length: Most letters in a string.
        block_size: Tokens in a sequence.
        batch_size: Problems per optimizer step, over all processes and accumulated micro-batches.
        held_out: Problems for validation, and as many others for testing.
        train_problems: How many of the others training draws from, the same ones for every seed; None for all.
        num_workers: Processes that prepare batches.
        seed: Chooses the training problems; set from seed_everything.
    """

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        alphabet: str = "abcdefgh",
        shortest_length: int = 3,
        longest_length: int = 6,
        block_size: int = 16,
        batch_size: int = 64,
        held_out: int = 1000,
        train_problems: int | None = None,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(
            block_size=block_size,
            batch_size=batch_size,
            held_out=held_out,
            train_problems=train_problems,
            num_workers=num_workers,
            seed=seed,
        )
        if len(set(alphabet)) < max(2, len(alphabet)) or set(alphabet) & set(END + ">"):
            raise UserError(f"data.alphabet is {alphabet!r}: say two or more letters, each once, without {END} and >")
        if shortest_length > longest_length:
            raise UserError(
                f"data.shortest_length {shortest_length} is above data.longest_length {longest_length}: change one"
            )
        self.alphabet, self.shortest_length, self.longest_length = alphabet, shortest_length, longest_length

    @property
    def symbols(self) -> str:
        """The letters and the sign before the answer."""
        return self.alphabet + ">"

    @property
    def size(self) -> int:
        """The number of strings of all lengths."""
        return sum(len(self.alphabet) ** n for n in range(self.shortest_length, self.longest_length + 1))

    def example(self, index: int) -> tuple[str, str]:
        """Return string number index, the shortest first, and its reverse."""
        base, length = len(self.alphabet), self.shortest_length
        while index >= base**length:
            index -= base**length
            length += 1
        text = "".join(self.alphabet[index // base**place % base] for place in range(length))
        return f"{text}>", text[::-1]

    def question(self, prompt: str) -> tuple[str, str]:
        """Return the string and the sign after it, abcd>, twice: people and the network read the same."""
        text = prompt.strip().removesuffix(">")
        if not self.shortest_length <= len(text) <= self.longest_length or set(text) - set(self.alphabet):
            raise UserError(
                f"{prompt[:40]!r} is no problem of this network: it takes {self.shortest_length} to "
                f"{self.longest_length} letters of {self.alphabet}, {self.example(0)[0]} say"
            )
        return f"{text}>", f"{text}>"

    def kind(self, problem: str) -> str:
        """Return how many letters it has."""
        return f"{len(problem) - 1} letters"

    def longest(self) -> tuple[str, str]:
        """Return the last one."""
        return self.example(self.size - 1)


def task_of(data: dict[str, Any]) -> TaskData | None:
    """Return the task that a recipe's data names; None if it names none, or one that cannot be made here."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskData, "data")
    try:
        task: TaskData | None = parser.instantiate(parser.parse_object({"data": data})).data
    except (ArgumentError, TypeError, ValueError, ImportError, AttributeError, KeyError, UserError):
        return None
    return task
