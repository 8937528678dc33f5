import re

import numpy as np
import pytest
import torch

from lm.data import ArithmeticData, ReverseData
from lm.data.module import IGNORED
from lm.errors import UserError


def made(kind=ArithmeticData, **settings):
    data = kind(**settings)
    data.setup("fit")
    return data


def written(data, row: int, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[str, str]:
    chosen = targets[row][targets[row] != IGNORED]
    return data.text_tokenizer.decode(tokens[row].tolist()), data.text_tokenizer.decode(chosen.tolist())


@pytest.mark.parametrize(
    ("operators", "reverse", "index", "expected"),
    [
        ("+", True, 123_456, ("123+456=", "975")),
        ("+", True, 999_999, ("999+999=", "8991")),
        ("+", False, 999_999, ("999+999=", "1998")),
        ("-", True, 5_123, ("5-123=", "-811")),
        ("*", False, 12_012, ("12*12=", "144")),
        ("/", False, 17 * 999 + 4, ("17/5=", "3r2")),
        ("/", False, 17 * 999, ("17/1=", "17r0")),
        ("/", False, 1000 * 999 - 1, ("999/999=", "1r0")),
        ("/+", False, 17_005, ("17+5=", "22")),
        ("/+", False, 1000**2 + 17 * 999 + 4, ("17/5=", "3r2")),
        ("+-", False, 2 * 7_003 + 1, ("7-3=", "4")),
    ],
)
def test_examples(operators: str, reverse: bool, index: int, expected: tuple[str, str]) -> None:
    data = ArithmeticData(operators=operators, reverse=reverse)
    assert data.example(index) == expected


def test_padded_operands() -> None:
    assert ArithmeticData(pad=True).example(7_003) == ("007+003=", "01")


def test_only_the_answer_and_its_mark_are_targets() -> None:
    data = made(block_size=16)
    tokens, targets = data.batch(np.array([123_456, 1_002]))
    assert written(data, 0, tokens, targets) == (".123+456=975....", "975.")
    assert written(data, 1, tokens, targets) == (".1+2=3..........", "3.")
    place = (targets[0] != IGNORED).nonzero().flatten()
    assert place.tolist() == [8, 9, 10, 11]  # each predicts the token after it
    assert targets[0, 8] == tokens[0, 9]


def test_training_never_draws_what_is_held_out() -> None:
    data = made(digits=1, held_out=20)
    drawn = set(data.problems(0, 5000).tolist())
    held = set(data._held.tolist())
    assert len(held) == 40 and not drawn & held
    assert drawn | held == set(range(100))


SETTINGS = [
    (digits, operators, reverse, pad)
    for digits in (1, 2)
    for operators in ("+", "-", "*", "/", "+/", "/-", "+-*/")
    for reverse in (False, True)
    for pad in (False, True)
]


@pytest.mark.parametrize(("digits", "operators", "reverse", "pad"), SETTINGS)
def test_no_text_is_in_two_splits(digits: int, operators: str, reverse: bool, pad: bool) -> None:
    """Each problem is one text and one number, and no quotient by zero is among them."""
    settings = {"digits": digits, "operators": operators, "reverse": reverse, "pad": pad}
    data = made(**settings, held_out=40 if digits == 1 else 1000)
    texts = ["".join(data.example(i)) for i in range(data.size)]
    assert len(set(texts)) == len(texts) == data.size
    assert not [text for text in texts if re.search("/0+=", text)]
    assert len([text for text in texts if "/" in text]) == ("/" in operators) * 10**digits * (10**digits - 1)
    held = [texts[i] for i in data._held]
    train = {texts[i] for i in data.problems(0, 20_000)}
    assert len(set(held)) == 2 * data.held_out and not train & set(held)
    if digits == 1:
        assert train | set(held) == set(texts)


@pytest.mark.parametrize("digits", [3, 9])
def test_of_more_digits_neither(digits: int) -> None:
    data = made(digits=digits, operators="/", block_size=40, held_out=500)
    texts = [{data.example(int(i))[0] for i in some} for some in (data._held, data.problems(0, 10_000))]
    assert len(texts[0]) == 1000 and not texts[0] & texts[1] and not [t for t in set.union(*texts) if "/0=" in t]


def test_a_stack_of_steps_is_the_steps_and_seeds_differ() -> None:
    data = made(batch_size=4)
    tokens, targets = data.train_dataset(3)[1]
    for i in range(3):
        assert torch.equal(tokens[i], data.train_dataset(1)[3 + i][0])
        assert torch.equal(targets[i], data.train_dataset(1)[3 + i][1])
    assert not np.array_equal(data.problems(0, 9), made(seed=1).problems(0, 9))


def test_strings_are_reversed_and_all_of_them_are_there() -> None:
    data = made(ReverseData, alphabet="abc", shortest_length=1, longest_length=3, held_out=5)
    examples = [data.example(i) for i in range(data.size)]
    assert data.size == 3 + 9 + 27 == len(set(examples))
    assert all(problem == answer[::-1] + ">" for problem, answer in examples)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ArithmeticData, {"operators": "%"}, "unknown operator '%'"),
        (ArithmeticData, {"operators": ""}, "is empty"),
        (ArithmeticData, {"digits": 0}, "data.digits is 0"),
        (
            ArithmeticData,
            {"digits": 5},
            r"data.block_size 16 does not hold 99999\+99999=899991 and a mark: it needs 19",
        ),
        (ArithmeticData, {"held_out": 500_000}, "leave none to train on: there are 1,000,000 problems"),
        (ReverseData, {"alphabet": "aa"}, "data.alphabet is 'aa'"),
        (ReverseData, {"shortest_length": 7}, "data.shortest_length is 7"),
        (ReverseData, {"longest_length": 9}, "data.block_size 16 does not hold"),
    ],
)
def test_bad_settings(kind, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(kind, **settings)
