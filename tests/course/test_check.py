"""The checker says of each mistake what kind it is, and is taken in by nothing."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lm.course import EXERCISES, table, workbook
from lm.course.check import Answer, check, judge
from lm.course.exercise import Values, reveal
from lm.course.student import answer
from tests.support.cases import often
from tests.support.solutions import MISTAKES, SOLVED, Mistake

VALUES: dict[str, Values] = {name: one.values(3) for name, one in EXERCISES.items()}


def functions(source: str) -> dict[str, Any]:
    space: dict[str, Any] = {"torch": torch, "F": F, "math": math}
    exec(source, space)
    return space


def judged(exercise: str, blank: str, source: str) -> Answer:
    told = answer(functions(source)[blank], VALUES[exercise])
    return judge(EXERCISES[exercise], EXERCISES[exercise].by_name[blank], VALUES[exercise], told)


def changed(mistake: Mistake) -> str:
    source = SOLVED[mistake.exercise]
    begin = source.index(f"def {mistake.blank}(")
    end = source.find("\ndef ", begin)
    part = source[begin : end if end > 0 else None]
    assert mistake.old in part
    return source.replace(part, part.replace(mistake.old, mistake.new))


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right(name: str) -> None:
    exercise = EXERCISES[name]
    for blank in exercise.blanks:
        ours = answer(blank.solution, VALUES[name])
        for row in (judge(exercise, blank, VALUES[name], ours), judged(name, blank.name, SOLVED[name])):
            assert row.state == "right", row
            assert row.differences is None or row.differences < 1e-6, row
        assert blank.hints and reveal(blank)


def test_every_mistake_is_seen_and_named() -> None:
    assert len(MISTAKES) >= 60
    rows = [judged(one.exercise, one.blank, changed(one)) for one in MISTAKES]
    assert [one for one, row in zip(MISTAKES, rows, strict=True) if row.state != "wrong"] == []
    named = [row.fault == one.kind for one, row in zip(MISTAKES, rows, strict=True)]
    assert sum(named) >= 0.95 * len(MISTAKES), [row for row, right in zip(rows, named, strict=True) if not right]


TRAPS = {
    "autograd": (
        "def dh(logits, h, W2, b2, dlogits):\n    x = h.clone().requires_grad_()\n    with torch.enable_grad():\n"
        "        y = x @ W2 + b2\n    return torch.autograd.grad(y, x, dlogits)[0]"
    ),
    "a function of autograd that was imported": (
        "from torch.func import vjp\ndef dh(h, W2, b2, dlogits): return vjp(lambda x: x @ W2 + b2, h)[1](dlogits)[0]"
    ),
    "forward differentiation": (
        "from torch.func import jvp\n"
        "def dh(h, W2, b2, dlogits): return jvp(lambda x: x @ W2 + b2, (h,), (torch.ones_like(h),))[1] @ W2.T"
    ),
    "a backward method": (
        "def helper(h, W2, d):\n    h.requires_grad = True\n    with torch.enable_grad():\n"
        "        (h @ W2).backward(d)\n    return h.grad\ndef dh(h, W2, dlogits): return helper(h, W2, dlogits)"
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_autograd_is_out_of_reach(trap: str) -> None:
    row = judged("mlp", "dh", TRAPS[trap])
    assert row.state == "wrong" and row.message.startswith("it calls autograd"), row


def test_what_passes_elsewhere() -> None:
    """A shape that would be broadcast; zeros where the true gradient of the whole is zero; a constant."""
    for blank, code in {
        "dbngain": "lambda dhpreact, bnraw: (dhpreact * bnraw).sum(0)",
        "dlogit_maxes": "lambda: torch.zeros(32, 1)",
        "db1": "lambda: torch.zeros(64)",
        "dbndiff2": "lambda dbnvar, m: dbnvar / m",
    }.items():
        assert judged("mlp", blank, f"{blank} = {code}").state == "wrong"


def book(path: Path, code: str, exercise: str = "cross-entropy") -> Path:
    path.write_text(f'import time\nimport torch\nfrom torch.nn import functional as F\nEXERCISE = "{exercise}"\n{code}')
    return path


@pytest.mark.slow
def test_a_file_is_run_in_a_process_with_a_limit(tmp_path: Path) -> None:
    code = SOLVED["small-steps"].replace("return dscaled * b\n", "print('hello')\n    while True: pass\n")
    code = code.replace("def da(dscaled, b): ", "def da(dscaled, b):\n    ").replace("return dD @ B.T", "return 1 / 0")
    began = time.monotonic()
    rows = {row.name: row for row in check(book(tmp_path / "a.py", code, "small-steps"), seconds=1.0)}
    assert time.monotonic() - began < 120
    assert "runs longer than 1 s" in rows["da"].message
    assert "ZeroDivisionError" in rows["dA"].message and "line" in rows["dA"].message
    assert {row.state for name, row in rows.items() if name not in ("da", "dA")} == {"right"}


@pytest.mark.parametrize(("code", "said"), often([
    ("def dlogits(logits, targets):\n    return (logits", "syntax error in line 6"),
    ("raise ValueError('no')", "line 5: raise ValueError('no'): ValueError: no"),
    ("import sys\nsys.exit(0)", "SystemExit"),
    ("def dlogits(logits, labels):\n    return logits", "there is no value named labels"),
    ("def dlogit(): pass", "the function dlogits is not there"),
    ("def dlogits(): return 'x'", "it returns a str"),
    ("def dlogits(logits): return logits / 0", "not finite"),
    ("def dlogits(logits): return (logits, logits)", "it returns 2 tensors"),
    ("def dlogits(logits):\n    import os\n    os._exit(3)", "exit code 3"),
    ("from lm.course.lecture import dlogits", "the product's own rules"),
    ("import lm.course.lecture\ndef dlogits(x): return lm.course.lecture.dlogits(x)", "the product's own rules"),
], 1))  # fmt: skip
def test_what_goes_wrong_is_a_line_that_helps(tmp_path: Path, code: str, said: str) -> None:
    (row,) = check(book(tmp_path / "a.py", code), seconds=20)
    assert row.state == "wrong" and said in row.message and "\n" not in row.message, row


@pytest.mark.parametrize("name", EXERCISES)
def test_a_notebook_has_the_same_cells_and_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its first cell to its last, as it is written, and solved."""
    exercise = EXERCISES[name]
    cells = json.loads(workbook.as_notebook(exercise))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = workbook.as_python(exercise)
    assert all(code in text for code in codes)
    for solution, right in (("", 0), (SOLVED[name], len(exercise.blanks))):
        space: dict[str, Any] = {"__name__": "__main__"}
        for code in [*codes[:-1], solution, codes[-1]]:
            exec(code, space)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 + len(exercise.blanks)
        assert sum(" yes  " in line for line in lines) == right


def test_a_table_has_the_lectures_columns() -> None:
    rows = [judged("mlp", "dh", SOLVED["mlp"]), judged("mlp", "dW2", "dW2 = lambda h: h")]
    lines = table.lines(rows)
    assert lines[0].split() == ["gradient", "exact", "approximate", "maxdiff", "differences"]
    assert lines[1].split()[:3] == ["dh", "yes", "yes"]
    assert "(32, 64), and must be (64, 27)" in lines[2]


def test_new_tensors_have_the_digits_of_the_values() -> None:
    code = "def dC(demb, tokens): return torch.zeros(27, 10).index_add(0, tokens.flatten(), demb.view(-1, 10))"
    assert judged("mlp", "dC", code).state == "right"
    assert torch.get_default_dtype() == torch.float32
