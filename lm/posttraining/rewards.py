"""What an answer is worth: a verifier, a learned reward model, or a class of your own with the same method."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class Reward(ABC):
    """Gives each answer a number."""

    def check(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Raise a UserError where the reward cannot judge what a policy of this vocabulary and context writes."""
        return

    @abstractmethod
    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        """Return the answers' rewards."""


class ExactAnswer(Reward):
    """1 for the answer that the data has, word for word and ended; 0 for any other."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        return [float(one.finished and one.text == one.expected) for one in answers]


class GoldName(Reward):
    """The rule by which the pairs of the corpus `preferences` were labelled: a reward that is known exactly."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        return [generated.gold_reward(one.text) for one in answers]


class LearnedReward(Reward):
    """What a reward model gives an answer.

    Args:
        ckpt_path: Of an `lm.posttraining.RewardModel`, with the policy's vocabulary.

    Raises:
        UserError: The checkpoint cannot be read, or is of no reward model.
    """

    def __init__(self, ckpt_path: Path) -> None:
        self.path = ckpt_path
        self.net, self.tokenizer, *_ = load_network(Path(ckpt_path), change=scalar_head)

    def check(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Refuse a policy of another vocabulary, or of a longer context."""
        if identity(tokenizer.state()) != identity(self.tokenizer.state()):
            raise UserError(
                f"model.reward: {self.path} has another vocabulary than the policy: begin both runs with the same "
                "checkpoint, and say data.tokenizer inherit"
            )
        if int(self.net.block_size) < block_size:  # type: ignore[arg-type]
            raise UserError(
                f"model.reward: {self.path} reads {self.net.block_size} tokens, the policy writes up to {block_size}: "
                "train it with the same data.block_size"
            )

    @torch.inference_mode()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the answers' rewards."""
        T = int(self.net.block_size)  # type: ignore[arg-type]  # noqa: N806
        longest = max(len(one.ids) for one in answers)
        if longest > T:
            raise UserError(f"model.reward: an answer has {longest} tokens, the context of {self.path} is {T}")
        tokens = torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in answers])  # (N, T)
        last = torch.tensor([[len(one.ids) - 1] for one in answers])  # (N, 1)
        values: list[float] = self.net(tokens)[..., 0].gather(1, last).squeeze(1).tolist()
        return values
