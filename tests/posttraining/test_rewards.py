"""Rewards that other programs give."""

import sys

import pytest

from lm.errors import UserError
from lm.posttraining.rewards import Answer, NearAnswer, ReasoningGym


def test_the_library_judges_its_own_problems() -> None:
    library = pytest.importorskip("reasoning_gym")
    reward = ReasoningGym("leg_counting", size=3, seed=1)
    problems = list(library.create_dataset("leg_counting", size=3, seed=1))

    def answer(text: str, *, prompt: str = problems[1]["question"], finished: bool = True) -> Answer:
        return Answer(prompt, text, "", finished, [])

    right = problems[1]["answer"]
    found = reward([answer(right), answer(right, finished=False), answer(right + "0")])
    assert found[:2] == [1.0, 0.0] and found[2] < 1.0
    with pytest.raises(UserError, match="'How\\?' is none of its 3 problems"):
        reward([answer(right, prompt="How?")])
    with pytest.raises(UserError, match="ReasoningGym: task no_such_task, size 3, seed 0: "):
        ReasoningGym("no_such_task", size=3)


def test_an_answer_that_is_partly_right() -> None:
    def answer(text: str, finished: bool = True) -> Answer:
        return Answer("", text, "579", finished, [])

    found = NearAnswer()([answer("579"), answer("579", False), answer("57"), answer("529"), answer("5790"), answer("")])
    assert found == [1, 3 / 4, 2 / 4, 3 / 4, 3 / 4, 0]


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'lm\[reasoning\]'"):
        ReasoningGym("leg_counting")
