"""`lm exercises`, as a student and a teacher use it."""

import json
from pathlib import Path

import pytest

from lm.course import EXERCISES
from tests.support.solutions import SOLVED


def test_write_solve_check(lm, workplace: Path) -> None:
    code, out, err = lm("exercises", "--output", "course", "--json")
    assert code == 0, err
    assert len(json.loads(out)["written"]) == 2 * len(EXERCISES)
    file = Path("course/02-cross-entropy.py")
    assert file.exists() and file.with_suffix(".ipynb").exists()
    code, out, err = lm("exercises", "--check", file)
    assert code == 1 and "dlogits  to be done" in out and "0 of 1 answers are right" in err
    text = file.read_text()
    begin = text.index("def dlogits(")
    end = text.index("\n# %%", begin)
    file.write_text(text[:begin] + SOLVED["cross-entropy"].strip() + "\n" + text[end:])
    code, out, err = lm("exercises", "--check", file, "--json")
    assert code == 0, out + err
    result = json.loads(out.splitlines()[-1])
    assert result["ok"] is True and result["right"] == result["answers"] == 1
    assert lm("exercises", "--output", "course")[1].startswith(
        f"0 workbooks in course; {2 * len(EXERCISES)} were there"
    )
    assert SOLVED["cross-entropy"].strip() in file.read_text()  # what is there is not replaced


@pytest.mark.slow
def test_a_notebook_is_checked_too(lm, workplace: Path) -> None:
    lm("exercises", "--output", "course")
    path = Path("course/02-cross-entropy.ipynb")
    book = json.loads(path.read_text())
    cell = next(one for one in book["cells"] if "def dlogits" in "".join(one["source"]))
    cell["source"] = "%matplotlib inline\n!ls\n" + SOLVED["cross-entropy"]
    path.write_text(json.dumps(book))
    code, out, err = lm("exercises", "--check", path)
    assert code == 0, out + err


@pytest.mark.slow
def test_a_folder_of_a_class(lm, workplace: Path) -> None:
    for student, wrong in (("ada", ""), ("ben", "2 * ")):
        Path("class", student).mkdir(parents=True)
        head = 'import torch\nfrom torch.nn import functional as F\nEXERCISE = "cross-entropy"\n'
        text = SOLVED["cross-entropy"].replace("return d", f"return {wrong}d")
        Path("class", student, "mine.py").write_text(head + text)
    code, out, _ = lm("exercises", "--check", "class", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 1 and result["ok"] is False and result["answers"] == 2
    assert [(row["file"], row["state"], row["fault"]) for row in result["rows"]] == [
        ("class/ada/mine.py", "right", ""),
        ("class/ben/mine.py", "wrong", "factor"),
    ]


def test_hints_come_one_at_a_time_and_the_derivation_last(lm, workplace: Path) -> None:
    blank = EXERCISES["batch-norm"].by_name["dhprebn"]
    for number, hint in enumerate(blank.hints, 1):
        code, out, _ = lm("exercises", "--hint", f"batch-norm/dhprebn:{number}")
        assert code == 0 and out.startswith(hint)
        assert [one in out for one in blank.hints] == [one == hint for one in blank.hints]
    assert "--reveal batch-norm/dhprebn" in out
    code, out, _ = lm("exercises", "--reveal", "batch-norm/dhprebn")
    assert code == 0 and "normal * (sum_x / m)" in out and "dr/dv = -½ r³" in out
    assert lm("exercises", "--hint", "dcounts")[1].startswith(EXERCISES["mlp"].by_name["dcounts"].hints[0])


@pytest.mark.parametrize(("words", "said"), [
    ((), "no task: say one of --output DIR, --check PATH, --hint NAME, --reveal NAME"),
    (("--hint", "dx", "--output", "x"), "--output and --hint"),
    (("--check", "nothing"), "nothing: there is no such file or folder"),
    (("--check", "words.txt"), "it must name one of small-steps, mlp"),
    (("--check", "."), "there is no workbook in it"),
    (("--hint", "dlogits"), "say which: mlp/dlogits, cross-entropy/dlogits"),
    (("--hint", "mlp/dnothing"), "say one of mlp/dlogprobs"),
    (("--hint", "mlp/dh:9"), "has the hints 1 to 1"),
    (("--check", "words.txt", "--seconds", "0"), "must be above 0"),
    (("--output", "words.txt"), "it is a file"),
    (("--output", "words.txt/more"), "--output words.txt/more: Not a directory"),
    (("--output", "a\0b"), "null byte"),
    (("--check", "/dev/zero"), "/dev/zero"),
])  # fmt: skip
def test_bad_input(lm, workplace: Path, words: tuple[str, ...], said: str) -> None:
    Path("words.txt").write_text("a\n")
    code, _, err = lm("exercises", *words)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
