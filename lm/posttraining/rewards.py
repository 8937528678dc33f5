"""What an answer is worth: a verifier, a learned reward model, or a class of your own with the same method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lm.checkpoints.restore import load_network
from lm.corpus import generated
from lm.errors import UserError
from lm.posttraining.reward_model import scalar_head
from lm.tokenizers import Tokenizer, identity


class Answer(NamedTuple):
    """What a policy wrote."""

    prompt: str
    text: str
    """Without the token that ends it."""
    expected: str
    """The answer that the data has."""
    finished: bool
    """Whether it ended by itself, rather than at the longest length."""
    ids: list[int]
    """Of the prompt and the answer, its end included."""


class Reward:
    """Gives each answer a number. A reward of your own has the method `__call__`."""

    readable: int | None = None
    """Most tokens of a prompt and its answer that it reads; None for any."""

    def check(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Raise a UserError where the reward cannot judge what a policy of this vocabulary and context writes."""
        return

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        """Return the answers' rewards.

        Raises:
            UserError: The class has no such method of its own.
        """
        raise UserError(
            f"model.reward {type(self).__name__} lacks the method __call__(self, answers), which returns a number for "
            "each answer: write it"
        )


def judged(reward: Reward, answers: Sequence[Answer]) -> list[float]:
    """Return the answers' rewards; raises UserError where a class of the user's gives anything else."""
    given: Any = reward(answers)
    try:
        found = [] if isinstance(given, Mapping | str) else [float(one) for one in given]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = []
    if len(found) != len(answers):
        what = f"gives {repr(given)[:60]} for {len(answers)} answers"
        raise UserError(f"model.reward {type(reward).__name__} {what}: it must give a number for each")
    return found


class ExactAnswer(Reward):
    """1 for the answer that the data has, word for word and ended; 0 for any other."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        return [float(one.finished and one.text == one.expected) for one in answers]


class NearAnswer(Reward):
    """The share of the symbols of the data's answer, its end among them, that are right at their place.

    Where few answers are right as a whole, it says sooner than `ExactAnswer` which parts are.
    """

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        return [
            sum(a == b for a, b in zip([*one.text, one.finished], [*one.expected, True], strict=False))
            / (len(one.expected) + 1)
            for one in answers
        ]


class GoldName(Reward):
    """The rule by which the pairs of the corpus `preferences` were labelled: a reward that is known exactly."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        return [generated.gold_reward(one.text) for one in answers]


class ReasoningGym(Reward):
    """What `reasoning-gym` gives an answer to one of its problems: a library of more than a hundred verified tasks.

    The data are conversations of the same problems, each question a prompt and its answer the completion. Any chat
    template and system message may stand around a question: it is found as it is written.

    Args:
        task: Its name there, leg_counting say.
        size: How many problems there are.
        seed: Of the problems.

    Raises:
        UserError: The library is missing, or has no such task.
    """

    def __init__(self, task: str, size: int = 1000, seed: int = 0) -> None:
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise UserError(f"model.reward ReasoningGym: {error}: pip install 'lm[reasoning]'") from error
        try:
            self.problems = create_dataset(task, size=size, seed=seed)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"model.reward ReasoningGym: task {task}, size {size}, seed {seed}: {error}") from error
        self.known = {one["question"].strip(): one for one in self.problems}  # many templates strip what they write

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards; one that did not end has none."""
        problems = {prompt: self._problem(prompt) for prompt in {one.prompt for one in answers}}
        return [one.finished * float(self.problems.score_answer(one.text, problems[one.prompt])) for one in answers]

    def _problem(self, prompt: str) -> Any:
        """Return the problem that a prompt asks: the last one in it, and of those that end alike the longest."""
        found = [(prompt.rfind(question) + len(question), len(question), question) for question in self.known]
        end, _, question = max((one for one in found if one[0] >= one[1]), default=(0, 0, ""))
        if not end:
            raise UserError(
                f"model.reward ReasoningGym: the prompt {prompt[:60]!r} has none of its {len(self.known)} problems: "
                "make the conversations of the same task, size and seed"
            )
        return self.known[question]


class LearnedReward(Reward):
    """What a reward model gives an answer.

    Args:
        ckpt_path: Of an `lm.posttraining.RewardModel`, with the policy's vocabulary.

    Raises:
        UserError: The checkpoint cannot be read, or is of no reward model.
    """

    readable: int

    def __init__(self, ckpt_path: Path) -> None:
        self.path = ckpt_path
        self.net, self.tokenizer, *_ = load_network(Path(ckpt_path), change=scalar_head)
        self.readable = int(self.net.block_size)  # type: ignore[arg-type]

    def check(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Refuse a policy of another vocabulary, or of a longer context."""
        if identity(tokenizer.state()) != identity(self.tokenizer.state()):
            raise UserError(
                f"model.reward: {self.path} has another vocabulary than the policy: begin both runs with the same "
                "checkpoint, and say data.tokenizer inherit"
            )
        if self.readable < block_size:
            raise UserError(
                f"model.reward: {self.path} reads {self.readable} tokens, the policy writes up to {block_size}: "
                "train it with the same data.block_size"
            )

    @torch.inference_mode()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        longest = max(len(one.ids) for one in answers)
        if longest > self.readable:
            raise UserError(f"model.reward: an answer has {longest} tokens, {self.path} reads {self.readable}")
        tokens = torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in answers])  # (N, T)
        last = torch.tensor([[len(one.ids) - 1] for one in answers])  # (N, 1)
        values: list[float] = self.net(tokens)[..., 0].gather(1, last).squeeze(1).tolist()
        return values
