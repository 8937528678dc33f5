"""Update the measured tables of the documents: run a table's commands and put in the rows they print.

    python benchmarks/figures.py                  list the names and their commands
    python benchmarks/figures.py scaling          run all commands of a table
    python benchmarks/figures.py scaling 2        run its second command only

A table stands right below a block of commands whose title names it:

    ```bash title="python benchmarks/figures.py scaling"
    python benchmarks/scaling.py
    ```

    | what | here | rounds |

A command prints a Markdown table. Its rows replace those of the page that begin with the same cell; new ones go to the
end. Cells are matched by the names of the columns, and columns that the page lacks are left out. Instead of a
table, a page may have a fenced block, which a command prints as a whole, such as the drawing in CONTRIBUTING.md.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = r'^```bash title="python benchmarks/figures\.py (?P<name>[\w-]+)"\n(?P<commands>.*?)^```\n\n'
BODY = r"(?P<body>(?:\|[^\n]*\n)+|^```\w+\n.*?^```\n)"
FIGURE = re.compile(COMMANDS + BODY, flags=re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", flags=re.MULTILINE)
FENCE = re.compile(r"^```\w+\n.*?^```\n", flags=re.DOTALL | re.MULTILINE)
MISSING = "–"


class Figure(NamedTuple):
    """A table, or a fenced block, and the commands that print it."""

    page: Path
    name: str
    commands: list[str]
    start: int
    end: int


def find(pages: tuple[Path, ...] = PAGES) -> Iterator[Figure]:
    """Yield the figures of the pages."""
    for page in pages:
        for match in FIGURE.finditer(page.read_text()) if page.exists() else ():
            yield Figure(page, match["name"], match["commands"].splitlines(), *match.span("body"))


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def merged(old: str, new: str) -> str:
    """Return a Markdown table, with rows replaced by those of another that begin with the same cell."""
    columns, *rows = [cells(line) for line in old.splitlines()]
    names, *printed = [cells(line) for line in new.splitlines()]
    if len({*names}) < len(names):
        raise ValueError(f"the command's table has two columns of one name: {', '.join(names)}")
    known = {row[0]: row for row in rows[1:]}
    for row in printed[1:]:
        found = dict(zip(names, row, strict=True))
        before = known.get(row[0], [row[0]] + [MISSING] * (len(columns) - 1))
        known[row[0]] = [row[0]] + [found.get(name, cell) for name, cell in zip(columns[1:], before[1:], strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, rows[0], *known.values()))


def renewed(old: str, printed: str) -> str:
    """Return a figure, updated by what a command has printed.

    Raises:
        ValueError: That is not a figure of its kind.
    """
    kind = TABLE if old.startswith("|") else FENCE
    found = kind.search(printed)
    if found is None:
        raise ValueError("the command printed neither a Markdown table nor a fenced block, whichever the page has")
    return merged(old, found[0]) if kind is TABLE else found[0]


def renew(name: str, number: int | None, pages: tuple[Path, ...] = PAGES) -> Path:
    """Run a figure's commands, all or one, and write what they print into its page; return the page.

    Raises:
        KeyError: There is no figure of that name.
    """
    figures = {figure.name: figure for figure in find(pages)}
    page, _, commands, *_ = figures[name]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    for command in commands if number is None else [commands[number - 1]]:
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        words = {"shell": True, "cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
        printed = subprocess.run(command, check=True, **words).stdout
        now = next(figure for figure in find((page,)) if figure.name == name)  # the page may have changed meanwhile
        text = page.read_text()
        page.write_text(text[: now.start] + renewed(text[now.start : now.end], printed) + text[now.end :])
    return page


def main() -> None:
    """List the figures, or update one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="Of a table; without it, all names and commands are listed.")
    parser.add_argument("number", nargs="?", type=int, help="Of a command, from 1; all of them by default.")
    options = parser.parse_args()
    if options.name:
        print(f"renewed: {renew(options.name, options.number).relative_to(ROOT)}")
        return
    for figure in find():
        print(f"{figure.name} ({figure.page.relative_to(ROOT)})")
        for number, command in enumerate(figure.commands, 1):
            print(f"  {number}  {command}")


if __name__ == "__main__":
    main()
