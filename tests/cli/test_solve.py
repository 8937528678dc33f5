"""`lm solve`: problems in, answers out; what is refused, and the table of what is right."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.oracle import written
from tests.support.served import written as of_text

Run = Callable[..., tuple[int, str, str]]
SETTINGS = {"digits": 2, "operators": "+-*/", "pad": True, "written_steps": True, "block_size": 21, "held_out": 300}


@pytest.fixture
def calculator(workplace: Path) -> Path:
    written(workplace / "knows.ckpt", "ArithmeticData", SETTINGS, wrong=["01+01="], endless=["02+02="])
    return workplace / "knows.ckpt"


def test_answers_are_padded_turned_round_and_plain(lm: Run, calculator: Path) -> None:
    problems = {"12*34": "408", " 007 + 5=": "12", "3-98": "-95", "97÷4": "24 remainder 1", "8/4": "2"}
    code, out, err = lm("solve", "--ckpt_path", calculator, *problems)
    assert (code, out.splitlines(), err) == (0, [*problems.values()], "")
    code, out, _ = lm("solve", "12×34", "97/4", "5−98", "--ckpt_path", calculator, "--show_steps", "--json")
    solutions = json.loads(out)["solutions"]
    assert [one["problem"] + one["steps"] for one in solutions] == [
        "12*34=48+360=408",
        "97/4=2r1,4r1=24r1",
        "5-98=-93",
    ]
    assert [one["answer"] for one in solutions] == ["408", "24 remainder 1", "-93"]


def test_options_may_stand_between_problems(lm: Run, calculator: Path) -> None:
    words = ("1+2", "--show_steps", "12*34", "--ckpt_path", calculator, "8/4", "--device=cpu", "97/4")
    code, out, err = lm("solve", *words)
    assert code == 0 and out == "1+2=3\n12*34=48+360=408\n8/4=0r0,2r0=2r0\n97/4=2r1,4r1=24r1\n", err
    for bad, message in {"--ckpt_path": "--ckpt_path", "--show_step": "did you mean show_steps?"}.items():
        code, out, err = lm("solve", "1+2", bad)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
    assert lm("solve", "--ckpt_path", calculator, "--", "1+2", "2+1")[:2] == (0, "3\n3\n")


REFUSED = {
    "123+4": "'123+4' is no problem of this network: it takes two numbers of up to 2 digits with + or - or * or /",
    "12^2": "is no problem of this network",
    "1+2+3": "is no problem of this network",
    "5/0": "'5/0': nothing is divided by zero: say another number",
    "five + two": "is no problem of this network",
    "": "'' is no problem of this network",
    "-1+2": "-1+2",
    "1.5+2": "is no problem of this network",
    "9" * 10_000 + "+1": "is no problem of this network",
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_it_was_not_trained_on(lm: Run, calculator: Path, problem: str) -> None:
    code, out, err = lm("solve", "--ckpt_path", calculator, "1+2", problem)
    assert (code, out, err.count("\n")) == (2, "", 1) and REFUSED[problem] in err
    assert len(err) < 250


def test_other_checkpoints(lm: Run, workplace: Path) -> None:
    code, _, err = lm("solve", "1+2")
    assert code == 2 and "--ckpt_path checkpoints/calculator/best.ckpt: there is none: lm fit --config configs" in err
    of_text(workplace / "text.ckpt")
    code, _, err = lm("solve", "1+2", "--ckpt_path", "text.ckpt")
    assert code == 2 and err.endswith("text.ckpt: it was not trained on problems: lm sample continues texts\n")
    for words in ((), ("1+2", "--split", "test")):
        code, _, err = lm("solve", "--ckpt_path", "text.ckpt", *words)
        assert code == 2 and "say one of them" in err and err.count("\n") == 1
    written(workplace / "turns.ckpt", "ReverseData", {"longest_length": 3, "held_out": 9})
    assert lm("solve", "--ckpt_path", "turns.ckpt", "abc", "hgf>")[1] == "cba\nfgh\n"


def test_an_answer_without_an_end(lm: Run, calculator: Path) -> None:
    code, out, err = lm("solve", "--ckpt_path", calculator, "1+2", "2+2")
    assert (code, out) == (1, "3\n")
    assert err == "error: 2+2= the network's answer has no end: train it longer\n"


def test_how_many_are_right(lm: Run, workplace: Path) -> None:
    few = {"digits": 1, "operators": "+/", "held_out": 30, "pad": True, "written_steps": True}
    task = written(workplace / "first.ckpt", "ArithmeticData", few)
    held = [problem for problem, _ in task.held_out_examples("test")]
    sums = [problem for problem in held if "+" in problem]
    written(workplace / "errs.ckpt", "ArithmeticData", few, wrong=sums[:2], endless=sums[2:3])
    code, out, _ = lm("solve", "--ckpt_path", "errs.ckpt", "--split", "test", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and len(set(held)) == 30 and found["right_result"] == 0.9 and found["step"] == 7
    there = {"+": len(sums), "/": 30 - len(sums)}
    assert found["kinds"] == [
        {"kind": "+ of 1 digit", "right": there["+"] - 3, "problems": there["+"]},
        {"kind": "/ of 1 digit", "right": there["/"], "problems": there["/"]},
    ]
    table = lm("solve", "--ckpt_path", "errs.ckpt", "--split", "test")[1]
    assert "| problems | right | of | right result |" in table
    assert re.search(r"^\| all \| 27 \| 30 \| 90.00% \|$", table, re.MULTILINE)
    assert lm("solve", "--ckpt_path", "errs.ckpt", "--split", "val")[1].endswith("| all | 30 | 30 | 100.00% |\n")
