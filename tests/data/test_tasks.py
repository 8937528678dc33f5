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
        ("/", False, 17_005, ("17/5=", "3r2")),
        ("/", False, 17_000, ("17/1=", "17r0")),
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
        (ReverseData, {"shortest_length": 7}, "data.shortest_length 7 is above"),
        (ReverseData, {"longest_length": 9}, "data.block_size 16 does not hold"),
    ],
)
def test_bad_settings(kind, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(kind, **settings)
