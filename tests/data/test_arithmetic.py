"""The steps of products and quotients, and the signs that people write."""

import random
import re

import pytest

from lm.data import ArithmeticData
from lm.errors import UserError


def made(**settings) -> ArithmeticData:
    return ArithmeticData(**({"operators": "+-*/", "digits": 2, "written_steps": True, "block_size": 40} | settings))


@pytest.mark.parametrize(
    ("settings", "problem", "expected"),
    [
        ({"pad": True}, "12*34=", "840+0630=804"),
        ({"pad": False}, "12*4=", "840=84"),
        ({"reverse": False}, "12*34=", "048+0360=408"),
        ({"pad": True}, "97/04=", "2r10,4r10=42r1"),
        ({"pad": False}, "7/14=", "0r70=0r7"),
        ({"reverse": False}, "97/4=", "2r01,4r01=24r1"),
        ({"pad": True}, "05-98=", "-39"),
        ({"digits": 3, "pad": True}, "120*034=", "0840+00630+000000=0804"),
        ({"digits": 3, "pad": True}, "999/027=", "0r900,3r810,7r000=73r0"),
    ],
)
def test_steps(settings: dict, problem: str, expected: str) -> None:
    data = made(**settings)
    a, operator, b = re.fullmatch(r"(\d+)(.)(\d+)=", problem).groups()
    assert data._problem(int(a), operator, int(b)) == (problem, expected)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_each_step_is_right(reverse: bool, pad: bool) -> None:
    """Read back as people write them, products add up, and each remainder goes into the next division."""
    data = made(reverse=reverse, pad=pad)
    for index in random.Random(1).sample(range(data.size), 400):
        problem, answer = data.example(index)
        a, operator, b = re.fullmatch(r"(\d+)(.)(\d+)=", problem).groups()
        steps, _, result = data.readable_steps(answer).rpartition("=")
        if operator == "*":
            products = [int(a) * int(digit) * 10**place for place, digit in enumerate(reversed(b))]
            assert steps == "+".join(map(str, products)) and int(result) == sum(products)
        elif operator == "/":
            rest = 0
            for digit, step in zip(a, steps.split(","), strict=True):
                quotient, remainder = map(int, step.split("r"))
                assert 10 * rest + int(digit) == quotient * int(b) + remainder and remainder < int(b) and quotient < 10
                rest = remainder
            assert result == f"{int(a) // int(b)}r{rest}"
        else:
            assert steps == "" and int(result) == (int(a) + int(b) if operator == "+" else int(a) - int(b))
        assert data.readable(answer) == result.removesuffix("r0").replace("r", " remainder ")


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("operators", ["*", "/", "+-*/"])
@pytest.mark.parametrize("pad", [False, True])
def test_the_longest_problem_with_steps_is_as_long_as_any(digits: int, operators: str, pad: bool) -> None:
    data = made(digits=digits, operators=operators, pad=pad)
    assert len("".join(data.longest())) == max(len("".join(data.example(i))) for i in range(0, data.size, 3))


def test_all_is_in_the_vocabulary() -> None:
    for operators in ("+", "-", "*", "/", "*/"):
        data = made(operators=operators, held_out=50)
        data.setup("fit")
        for index in range(0, data.size, 97):
            text = "".join(data.example(index))
            assert data.text_tokenizer.decode(data.text_tokenizer.encode(text).tolist()) == text


def test_signs_that_people_write() -> None:
    assert [made(pad=True).question(one)[1] for one in ("1 × 2", "1·2", "9÷3", "7 − 9")] == [
        "01*02=", "01*02=", "09/03=", "07-09=",
    ]  # fmt: skip
    assert made().question("0" * 5000 + "1+2=")[0] == "1+2="
    with pytest.raises(UserError, match="is no problem of this network"):
        made(operators="+").question("9÷3")


def test_kinds() -> None:
    assert [made().kind(one) for one in ("01+02=", "12*03=", "9/3=")] == [
        "+ of 1 digit", "* of 2 digits", "/ of 1 digit",
    ]  # fmt: skip
