"""Rewards that other programs give."""

import sys
from types import SimpleNamespace

import pytest

from lm.data.chat import Encoded, sequences
from lm.errors import UserError
from lm.models import GPT
from lm.posttraining.rewards import Answer, NearAnswer, ReasoningGym
from lm.posttraining.rollouts import prompts_of, written
from lm.tokenizers import BytePairTokenizer, chat
from lm.tokenizers.chat import TEMPLATE
from lm.tokenizers.merges import to_text


def test_the_library_judges_its_own_problems() -> None:
    library = pytest.importorskip("reasoning_gym")
    reward = ReasoningGym("leg_counting", size=3, seed=1)
    problems = list(library.create_dataset("leg_counting", size=3, seed=1))

    def answer(text: str, *, prompt: str = problems[1]["question"], finished: bool = True) -> Answer:
        return Answer(prompt, text, "", finished, [])

    right = problems[1]["answer"]
    found = reward([answer(right), answer(right, finished=False), answer(right + "0")])
    assert found[:2] == [1.0, 0.0] and found[2] < 1.0
    with pytest.raises(UserError, match="'How\\?' has none of its 3 problems"):
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


class Sums(list[dict[str, str]]):
    """Stands in for a dataset of the library, which need not be installed: the same two things are asked of it."""

    def score_answer(self, text: str, entry: dict[str, str]) -> float:
        return float(text == entry["answer"])


CHATML = (
    "{% for one in messages %}{{ '<|im_start|>' + one.role + '\n' + one.content.strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> ReasoningGym:
    pairs = [(" 1 + 2?\n", "3"), ("11 + 2?", "13"), ("1 + 2? Add 1.", "4")]
    problems = Sums({"question": question, "answer": answer} for question, answer in pairs)
    library = SimpleNamespace(create_dataset=lambda task, size, seed: problems)
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    return ReasoningGym("sums")


@pytest.mark.parametrize("template", [TEMPLATE, CHATML], ids=["lm", "ChatML"])
def test_a_question_is_found_within_a_template_and_after_a_system_message(sums: ReasoningGym, template: str) -> None:
    special = {"<|im_start|>": 256, "<|im_end|>": 257, "<|eot|>": 258}
    plain = BytePairTokenizer(to_text({bytes([i]): i for i in range(256)}), special=special, end_of_text="<|eot|>")
    if template == CHATML:
        plain.chat = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    tokenizer = chat.for_chat(plain)
    talks = [
        [
            {"role": "system", "content": "Say a number, as 4 for 1 + 2? Add 1."},
            {"role": "user", "content": one["question"]},
            {"role": "assistant", "content": one["answer"]},
        ]
        for one in sums.problems
    ]
    encoded = [[Encoded(*one)] for one in chat.encode_all(tokenizer, talks)]
    prompts = prompts_of(*sequences(encoded, 128, tokenizer))
    net = GPT(tokenizer.n_vocab, 128, n_layer=1, n_head=1, n_embd=4).eval()
    answers = written(net, tokenizer, prompts, [1, 2, 3], 1)
    for right in ("3", "13", "4"):
        given = sums([one._replace(text=right, finished=True) for one in answers])
        assert given == [float(one["answer"] == right) for one in sums.problems]
