"""Checks a workbook: each blank against autograd and central differences, and if it is wrong, in which way."""

import ast
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm import storage
from lm.course import EXERCISES
from lm.course.diagnosis import diagnose
from lm.course.exercise import Blank, Exercise, Values
from lm.course.lecture import PARAMETERS
from lm.course.workbook import TO_DO
from lm.errors import UserError

SECONDS = 10.0
"""How long a blank may take; each is done in a moment."""
STARTING = 60.0
"""How long Python may take to import torch."""
ENDING = 10.0
"""How long Python may take to end."""
TOLERANCE = 1e-8
SEEDS = (1, 2)
BACKWARDS = [PARAMETERS.index(name) for name in ("b2", "W2", "bnbias", "bngain", "b1", "W1", "C")]
"""What the backward pass comes to first: what is wrong there is wrong in all that follow."""


@dataclass(frozen=True)
class Answer:
    """A row of the table.

    Attributes:
        exercise: Name of the workbook.
        name: Of the blank.
        state: right, wrong, or blank.
        exact: Whether it is autograd's to the last bit.
        approximate: Whether it is but for rounding.
        maxdiff: The largest difference; None where there is nothing to compare.
        differences: By how much its slope along a random direction differs from central differences', relatively.
        fault: The kind of fault; empty where it is right.
        message: What is wrong, in a line.
    """

    exercise: str
    name: str
    state: str
    exact: bool = False
    approximate: bool = False
    maxdiff: float | None = None
    differences: float | None = None
    fault: str = ""
    message: str = ""


def workbooks(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return a workbook, or those of a folder, sorted; and what is left out of the folder, with the reason.

    Of a .py and an .ipynb of a name counts the one in which more is done, and of equals the one changed last.

    Raises:
        UserError: There is none.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder: name a workbook that lm exercises has written")
    if not path.is_dir():
        return [path], {}
    best: dict[Path, tuple[int, int, Path]] = {}
    left_out: dict[Path, str] = {}
    for one in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in one.relative_to(path).parts)
        if hidden or one.suffix not in (".py", ".ipynb") or one.is_dir():
            continue
        try:
            text = source(one)
            exercise_of(one, text)
        except UserError as error:
            left_out[one] = error.text
            continue
        found = (text.count(TO_DO), -one.stat().st_mtime_ns, one)
        best[one.with_suffix("")] = min(found, best.get(one.with_suffix(""), found))
    if not best:
        raise UserError(f"{path}: there is no workbook in it: write some with lm exercises, and name their folder")
    return [one for _, _, one in best.values()], left_out


def source(path: Path) -> str:
    """Return the Python code of a workbook; of a notebook, of its code cells, whose lines for the shell are left out.

    Raises:
        UserError: It cannot be read.
    """
    try:
        text = storage.plain(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}: name a workbook") from error
    if path.suffix != ".ipynb":
        return text
    try:
        cells = json.loads(text)["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: it is not a notebook: {error}: save it again, or write a new one") from error
    return "\n\n".join(re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE) for code in codes)


def _named(text: str) -> str | None:
    found = re.search(r"""^EXERCISE\s*=\s*(["'])([\w-]+)\1""", text, flags=re.MULTILINE)
    return found[2] if found else None


def exercise_of(path: Path, text: str) -> Exercise:
    """Return the exercise that a workbook is for.

    Raises:
        UserError: It does not say.
    """
    name = _named(text)
    if name not in EXERCISES:
        known = ", ".join(EXERCISES)
        raise UserError(f'{path}: its line EXERCISE = "…" names {name or "nothing"}: it must name one of {known}')
    return EXERCISES[name]


def check(path: Path, seconds: float = SECONDS) -> list[Answer]:
    """Check every blank of a workbook.

    Raises:
        UserError: It is not one.
    """
    text = source(path)
    exercise = exercise_of(path, text)
    try:
        ast.parse(text)
    except SyntaxError as error:
        line = (error.text or "").strip()
        message = f"syntax error in line {error.lineno}: {line}: {error.msg}"
        return [Answer(exercise.name, blank.name, "wrong", fault="error", message=message) for blank in exercise.blanks]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "workbook.py"
        file.write_text(text, encoding="utf-8")
        told = _run(file, exercise, seconds)
    values = [exercise.values(seed) for seed in SEEDS]
    return [_worst(exercise, blank, values, told[blank.name]) for blank in exercise.blanks]


def _worst(exercise: Exercise, blank: Blank, values: list[Values], told: list[dict[str, Any]]) -> Answer:
    """Return the first row that is not right, of those for each seed; or the first."""
    rows = [judge(exercise, blank, one, found) for one, found in zip(values, told, strict=False)]
    return next((row for row in rows if row.state != "right"), rows[0])


def _run(file: Path, exercise: Exercise, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Return what the student's functions give for each seed; where one takes too long, the others go on."""
    told: dict[str, list[dict[str, Any]]] = {}
    left = [blank.name for blank in exercise.blanks]
    while left:
        begun, failed = _process(file, exercise.name, left, seconds, told)
        left = [name for name in left if name not in told]
        for name in [begun] if begun in left else left:
            told[name] = [{"error": failed}]
        left = [name for name in left if name not in told]
    return told


def _process(
    file: Path, name: str, blanks: list[str], seconds: float, told: dict[str, list[dict[str, Any]]]
) -> tuple[str, str]:
    """Let a process answer; return the blank that it was at when it ended, and why, where that is known."""
    words = [sys.executable, "-m", "lm.course.student", str(file), name, ",".join(map(str, SEEDS)), *blanks]
    begun, failed = "", ""
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        words, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, start_new_session=True
    ) as process:
        try:
            for fields in _read(process, seconds):
                if "begun" in fields:
                    begun = fields["begun"]
                elif "failed" in fields:
                    failed = fields["failed"]
                else:
                    told[fields["name"]] = fields["answers"]
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
        except TimeoutError:
            return begun, f"it runs longer than {seconds:g} s: is there an endless loop?"
        except (ValueError, KeyError, TypeError):
            return begun, "it writes where its answers are written: let it print, or return a tensor"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what the file may have started
    code = process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return begun, failed or f"Python {how}: it must return a tensor"


def _read(process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[dict[str, Any]]:
    """Yield each line of JSON that a process writes, until it ends.

    Raises:
        TimeoutError: It is silent for longer than so many seconds; before the first line, than a minute.
        ValueError: A line is no JSON.
    """
    assert process.stdout is not None
    rest, until = b"", time.monotonic() + STARTING
    while select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            until = time.monotonic() + seconds
            yield json.loads(line)
    raise TimeoutError


def judge(exercise: Exercise, blank: Blank, values: Values, told: dict[str, Any]) -> Answer:
    """Compare an answer with autograd's and with central differences."""
    row: dict[str, Any] = {"exercise": exercise.name, "name": blank.name}
    if told.get("blank"):
        return Answer(**row, state="blank", message="still to be done")
    if "error" in told:
        return Answer(**row, state="wrong", fault="error", message=told["error"])
    found = [torch.tensor(one["numbers"], dtype=torch.float64).view(one["shape"]) for one in told["values"]]
    right = exercise.expected(blank, values)
    expected: list[Tensor] = [right] if isinstance(right, Tensor) else list(right)
    if len(found) != len(expected):
        message = f"it returns {len(found)} tensors: it must return {len(expected)}"
        return Answer(**row, state="wrong", fault="shape", message=f"shape: {message}")
    labels = [""] if len(expected) == 1 else [f" (at {name})" for name in PARAMETERS]
    same = [a.shape == b.shape for a, b in zip(found, expected, strict=True)]
    maxdiff = None
    if all(same):
        maxdiff = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    exact = all(map(torch.equal, found, expected))
    largest = max(float(one.abs().max()) for one in expected)
    good = [_agree(a, b, 0.01 * largest) for a, b in zip(found, expected, strict=True)]
    differences = None
    if blank.expected is None and same[0]:
        differences = _against_differences(exercise, blank, values, found[0], expected[0])
    measured: dict[str, Any] = {
        "exact": exact,
        "approximate": all(good),
        "maxdiff": maxdiff,
        "differences": differences,
    }
    if all(good):
        return Answer(**row, state="right", **measured)
    at = next(i for i in (BACKWARDS if len(good) > 1 else [0]) if not good[i])
    digits = told["values"][at]["digits"].removeprefix("torch.")
    if digits != "float64" and same[at] and torch.allclose(found[at], expected[at], rtol=1e-2, atol=1e-3 * largest):
        message = f"rounded: it is {digits}, with fewer digits than the float64 of the values: leave its dtype as it is"
    else:
        asked = blank.single(values, at) if blank.single else (exercise, blank, values)
        message = diagnose(*asked, found[at], expected[at])
    message += labels[at]
    return Answer(**row, state="wrong", **measured, fault=message.partition(":")[0], message=message)


def _agree(found: Tensor, expected: Tensor, least: float) -> bool:
    """Return whether two are equal but for rounding, which is measured by the largest number, or a least scale."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * max(least, float(expected.abs().max())))


def _against_differences(exercise: Exercise, blank: Blank, values: Values, found: Tensor, expected: Tensor) -> float:
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = exercise.slope(blank.of, direction, values)
    return abs(float((found * direction).sum()) - slope) / max(abs(slope), 1e-12)
