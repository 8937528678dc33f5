"""`lm exercises`: write workbooks, check them, give hints."""

from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser

from lm.cli import common, plain_help, values
from lm.course import EXERCISES, check, table, workbook
from lm.course.exercise import Blank, Exercise, reveal
from lm.errors import CheckError, UserError

ADVICE = """Save this file, then in a terminal `lm exercises --check FILE`. For a hint `lm exercises --hint NAME`, for
the derivation `lm exercises --reveal NAME`.
"""


def make_parser() -> ArgumentParser:
    """Return the parser of `lm exercises`."""
    parser = plain_help.make_parser(
        "exercises", "Gradients to derive by hand: write workbooks, check them, give hints. Say one of the first four."
    )
    parser.add_argument("--output", type=Path | None, default=None, metavar="DIR", help="Write all workbooks there.")
    parser.add_argument(
        "--check",
        type=Path | None,
        default=None,
        metavar="PATH",
        help="Check a workbook, or all of a folder; exit 1 where an answer is wrong or missing.",
    )
    parser.add_argument(
        "--hint", type=str | None, default=None, metavar="NAME[:N]", help="Print a hint, the first or the N-th: mlp/dh."
    )
    parser.add_argument(
        "--reveal", type=str | None, default=None, metavar="NAME", help="Print the derivation and the solution."
    )
    parser.add_argument("--seconds", type=float, default=check.SECONDS, help="How long a blank may take to compute.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON; the rest goes to stderr.")
    return parser


def exercises(arguments: list[str]) -> None:
    """Run `lm exercises`.

    Raises:
        CheckError: An answer is wrong or missing.
    """
    options = values.parse(make_parser(), arguments)
    said = [name for name in ("output", "check", "hint", "reveal") if options[name] is not None]
    if len(said) != 1:
        raise UserError(
            f"lm exercises: found {' and '.join(f'--{name}' for name in said) or 'no task'}: "
            "say one of --output DIR, --check PATH, --hint NAME, --reveal NAME"
        )
    if options.output is not None:
        _write(options.output, options.json)
    elif options.check is not None:
        _check(options.check, options.seconds, options.json)
    elif options.hint is not None:
        _hint(options.hint, options.json)
    else:
        exercise, blank = _find(options.reveal, "--reveal")
        text = f"{exercise.name}/{blank.name}: {reveal(blank)}"
        print(text, file=common.output(options.json))
        if options.json:
            common.print_json({"name": f"{exercise.name}/{blank.name}", "text": text})


def _write(folder: Path, as_json: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: it is a file: name a folder")
    written = workbook.write(folder, ADVICE)
    stream = common.output(as_json)
    kept = 2 * len(EXERCISES) - len(written)
    print(
        f"{len(written)} workbooks in {folder}{f'; {kept} were there and are as they were' * bool(kept)}", file=stream
    )
    print(f"begin with {folder}/00-small-steps.py or .ipynb; lm exercises --check {folder} checks all", file=stream)
    if as_json:
        common.print_json({"path": str(folder), "written": [str(path) for path in written]})


def _check(path: Path, seconds: float, as_json: bool) -> None:
    stream = common.output(as_json)
    rows = []
    books, left_out = check.workbooks(path)
    for book in books:
        found = check.check(book, seconds)
        rows += [{"file": str(book), **asdict(row)} for row in found]
        print(f"{book}", *table.lines(found), sep="\n", end="\n\n", file=stream, flush=True)
    for reason in left_out.values():
        print(f"left out: {reason}", file=stream)
    wrong = [row for row in rows if row["state"] != "right"]
    todo = sum(row["state"] == "blank" for row in wrong)
    if as_json:
        result = {"ok": not wrong, "right": len(rows) - len(wrong), "answers": len(rows), "rows": rows}
        common.print_json(result | {"left_out": {str(book): reason for book, reason in left_out.items()}})
    if wrong:
        parts = [f"{len(wrong) - todo} wrong" * (len(wrong) > todo), f"{todo} to be done" * bool(todo)]
        first = wrong[0]
        raise CheckError(
            f"{len(rows) - len(wrong)} of {len(rows)} answers are right, {', '.join(filter(None, parts))}: "
            f"lm exercises --hint {first['exercise']}/{first['name']}"
        )
    print(f"all {len(rows)} answers are right", file=stream)


def _hint(name: str, as_json: bool) -> None:
    wanted, _, number = name.partition(":")
    exercise, blank = _find(wanted, "--hint")
    full, count = f"{exercise.name}/{blank.name}", len(blank.hints)
    if number and not (number.isdecimal() and 1 <= int(number) <= count):
        raise UserError(f"--hint {name}: {full} has the hints 1 to {count}; after them comes --reveal {full}")
    at = int(number or 1)
    more = f"--hint {full}:{at + 1}" if at < count else f"--reveal {full}"
    print(f"{blank.hints[at - 1]}\n\nmore: lm exercises {more}", file=common.output(as_json))
    if as_json:
        common.print_json({"name": full, "hint": blank.hints[at - 1], "number": at, "hints": count})


def _find(name: str, option: str) -> tuple[Exercise, Blank]:
    """Return a blank by its name, with the exercise's in front where several have one of that name."""
    book, _, wanted = name.rpartition("/")
    found = [
        (exercise, exercise.by_name[wanted])
        for exercise in EXERCISES.values()
        if wanted in exercise.by_name and book in ("", exercise.name)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{exercise.name}/{wanted}" for exercise, _ in found)
        raise UserError(f"{option} {name}: say which: {names}")
    where = EXERCISES.get(book or wanted)
    known = [f"{where.name}/{one}" for one in where.by_name] if where else list(EXERCISES)
    raise UserError(f"{option} {name[:60]}: there is none of that name: say one of {', '.join(known)}")
