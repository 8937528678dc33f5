"""The checker says of each mistake what kind it is, and is taken in by nothing."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lm.backprop.atomic import called
from lm.course import EXERCISES, table, workbook
from lm.course.check import Answer, check, exercise_of, judge, source, workbooks
from lm.course.exercise import Values, reveal
from lm.course.student import answer, as_json
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
        with torch.no_grad():
            ours = as_json(called(blank.solution, VALUES[name]))
        for row in (judge(exercise, blank, VALUES[name], ours), judged(name, blank.name, SOLVED[name])):
            assert row.state == "right", row
            assert row.differences is None or row.differences < 1e-6, row
        assert blank.hints and reveal(blank)


def test_every_mistake_is_seen_and_named() -> None:
    assert len(MISTAKES) >= 60
    rows = [judged(one.exercise, one.blank, changed(one)) for one in MISTAKES]
    assert [one for one, row in zip(MISTAKES, rows, strict=True) if row.state != "wrong"] == []
    named = [row.fault == one.kind for one, row in zip(MISTAKES, rows, strict=True)]
    assert all(named), [row for row, right in zip(rows, named, strict=True) if not right]


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
    "again, where it was refused": (
        "def dh(h, W2, b2, dlogits):\n    for i in range(2):\n        try: torch.func.vjp(lambda x: x @ W2 + b2, h)\n"
        "        except Exception: pass\n    return dlogits @ W2.T"
    ),
    "the graph's own nodes": (
        "def dh(h, W2, dlogits):\n    with torch.enable_grad():\n        y = h.requires_grad_() @ W2\n"
        "    return y.grad_fn(dlogits)[0]"
    ),
    "gradients in a thread of its own": (
        "from concurrent.futures import ThreadPoolExecutor\ndef dh(h, W2, dlogits):\n    h.requires_grad_()\n"
        "    with ThreadPoolExecutor() as pool: pool.submit(lambda: (h @ W2).backward(dlogits))\n"
        "    return dlogits @ W2.T"
    ),
    "a part of autograd by its name": (
        "def dh(dlogits, W2):\n    getattr(torch.ops.aten, 'tanh_back' + 'ward')(W2, W2)\n    return dlogits @ W2.T"
    ),
    "a module of gradients": (
        "import torch.nn.grad\ndef dh(dlogits, W2):\n    x, w = torch.ones(1, 1, 5), torch.ones(1, 1, 2)\n"
        "    torch.nn.grad.conv1d_input(x.shape, w, torch.ones(1, 1, 4))\n    return dlogits @ W2.T"
    ),
}
OURS = {
    "by its name": "from lm.course.lecture import dlogits",
    "by a helper": (
        "from lm.course.lecture import CROSS_ENTROPY\n"
        "def ask(**values): return CROSS_ENTROPY.blanks[0].solution(**values)\n"
        "def dlogits(logits, targets): return ask(logits=logits, targets=targets)"
    ),
    "by its module's name": (
        "from importlib import import_module\n"
        "def dlogits(logits, targets): return import_module('lm.backprop.loss').cross_entropy(logits, targets)[1]"
    ),
}
INNOCENT = """
def dlogits(logits, targets):
    with torch.no_grad():
        print(logits, logits.mean())
    p = torch.softmax(logits, dim=1)
    p[range(len(p)), targets] -= 1
    return backward(p)
def backward(p): return p / len(p)
"""


@pytest.mark.parametrize("trap", TRAPS)
def test_autograd_is_out_of_reach(trap: str) -> None:
    row = judged("mlp", "dh", TRAPS[trap])
    assert row.state == "wrong" and row.message.startswith("it calls autograd"), row


@pytest.mark.parametrize("way", OURS)
def test_the_products_rules_are_out_of_reach(way: str) -> None:
    row = judged("cross-entropy", "dlogits", OURS[way])
    assert row.state == "wrong" and row.message.startswith("it calls the product's own rules"), row


def test_what_computes_no_gradient_is_not_refused() -> None:
    assert judged("cross-entropy", "dlogits", INNOCENT).state == "right"


def test_an_answer_may_change_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    """As the lecture's own training does."""
    in_place = (
        "def train(parameters, batches, lr):\n    for tokens, targets in batches:\n"
        "        for p, g in zip(parameters, gradients(*parameters, tokens, targets)): p.data += -lr * g\n"
        "    return parameters"
    )
    space = functions(SOLVED["training"])
    exec(in_place, space)
    table.show("training", space)
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["gradients", "no", "yes"], ["train", "no", "yes"]]


def test_an_answer_of_millions_is_not_sent() -> None:
    row = judged("mlp", "dh", "def dh(h): return h.expand(10_000, 32, 64)")
    assert row.fault == "error" and "of shape (10000, 32, 64)" in row.message, row


def test_fewer_digits_are_named() -> None:
    row = judged("mlp", "dh", "def dh(dlogits, W2): return (dlogits @ W2.T).float()")
    assert row.fault == "rounded" and "float32" in row.message, row


@pytest.mark.parametrize("code", [
    "dh = max", "dh = torch.matmul", "def dh(*values): return 1", "def dh(dlogits, /): return dlogits",
    "def dh(dlogits, W2): return (dlogits @ W2.T).numpy()",
    "def dh(dlogits, W2): return (dlogits @ W2.T).to('meta')",
    "def dh(h): return [h, None]", "def dh(dlogits): return dh(dlogits)", "class dh: pass",
])  # fmt: skip
def test_odd_answers_are_wrong_in_a_line(code: str) -> None:
    row = judged("mlp", "dh", code)
    assert row.state == "wrong" and row.message and "\n" not in row.message, row


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
    ("def dlogits(logits):\n    import os\n    os.abort()", "was ended by SIGABRT"),
    ("def dlogits(logits): exit()", "SystemExit"),
    ("import os\nfor i in range(3, 30):\n  try: os.write(i, b'junk\\n')\n  except OSError: pass", "it writes where"),
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


@pytest.mark.slow
def test_endless_output_and_what_a_file_starts_end_with_the_limit(tmp_path: Path) -> None:
    """It prints for ever, and so does a process that it has forked."""
    code = "import os\ndef dlogits(logits):\n    os.fork()\n    while True: print('x' * 1000)\n"
    began = time.monotonic()
    (row,) = check(book(tmp_path / "a.py", code), seconds=1.0)
    assert "runs longer than 1 s" in row.message and time.monotonic() - began < 60


def test_a_file_as_other_editors_save_it(tmp_path: Path) -> None:
    path = book(tmp_path / "a.py", SOLVED["cross-entropy"])
    text = path.read_text().replace('"cross-entropy"', "'cross-entropy'").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    text = source(path)
    assert exercise_of(path, text).name == "cross-entropy"
    assert judged("cross-entropy", "dlogits", text).state == "right"


def test_workbooks_of_a_folder(tmp_path: Path) -> None:
    """Of two of a name counts the one in which more is done, whichever was touched last."""
    course = tmp_path / ".hidden/course"
    done = workbook.write(course)
    solved = course / "02-cross-entropy.py"
    begin, end = (text := solved.read_text()).index("def dlogits("), text.index("\n# %%", text.index("def dlogits("))
    solved.write_text(text[:begin] + SOLVED["cross-entropy"] + text[end:])
    solved.with_suffix(".ipynb").touch()
    (course / "more").mkdir()
    for name, data in {
        "a.py": b"\xff\xfe",
        "b.ipynb": b"[]",
        "c.py": b"x = 1\n",
        "d.py": b'EXERCISE = "mlp9"\n',
    }.items():
        (course / "more" / name).write_bytes(data)
    (course / "more/e.py").mkdir()
    found, left_out = workbooks(course / "more" / "..")
    assert len(found) == len(done) / 2 == len(EXERCISES)
    assert [path.suffix for path in found if path.stem == solved.stem] == [".py"]
    assert [path.name for path in left_out] == ["a.py", "b.ipynb", "c.py", "d.py"]
    for said, reason in zip(
        ("not UTF-8", "not a notebook", "names nothing", "names mlp9"), left_out.values(), strict=True
    ):
        assert said in reason and "\n" not in reason, reason
