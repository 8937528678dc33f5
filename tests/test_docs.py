"""README and the pages of docs/: their code and commands run as they stand, in order, cut to a few steps."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image, ImageChops, ImageStat

from benchmarks import figures, house
from lm.cli import COMMANDS
from tests.conftest import MISSING, REFERENCE, ROOT

pytestmark = pytest.mark.usefixtures("our_rules")
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PICTURES = sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".svg", ".png", ".html"))
PAGES = [ROOT / "README.md", *DOCS]
TEXTS = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
STEPS = "--trainer.max_steps 4 --trainer.val_check_interval 4 --trainer.limit_val_batches 2"
FEW = [*STEPS.split(), "--samples.max_new_tokens", "8", "--figures.every_n_steps", "0"]
HELPERS = {
    "fault_kinds",
    "figures",
    "house",
    "power_cut",
    "recurrent_of_torch",
}  # of benchmarks, and what prints no figure
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def python_blocks(page: Path) -> list[str]:
    """Return a page's python blocks, each moved down to its own line so that a failure names the page's line."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def bash_blocks(page: Path, *, titled: bool) -> list[list[str]]:
    """Return the commands of a page's bash blocks: those with a title cannot run on any machine."""
    found = re.findall(r"^```bash( title=[^\n]*)?\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [body.replace("\\\n", "").strip().splitlines() for title, body in found if bool(title) == titled]


def cases() -> list[Any]:
    """Return the pages that have commands: README's run every time, unless they start ranks."""
    found = []
    for page in PAGES:
        for ranks in (False, True):
            blocks = bash_blocks(page, titled=False)
            lines = [line for block in blocks if ("--trainer.devices" in " ".join(block)) == ranks for line in block]
            if lines:
                marks = [pytest.mark.slow] * (ranks or page.stem != "README")
                found.append(pytest.param(page, lines, id=f"{page.stem}{'-ranks' * ranks}", marks=marks))
    return found


def test_there_are_blocks() -> None:
    assert sum(len(python_blocks(page)) for page in PAGES) >= 25
    ran = {page.stem for page in PAGES if bash_blocks(page, titled=False)}
    assert {
        "README",
        "usage",
        "data",
        "resume",
        "clusters",
        "gradients",
        "extending",
        "attention",
        "weights",
        "teaching",
    } <= ran
    shown_only = {"figures", "records", "faults", "log", "container", "security", "lightning", "backprop", "generation"}
    shown_only |= {"serving"}
    assert {page.stem for page in PAGES} == ran | shown_only, "a page without a command says here that it has none"


@each_page
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    assert not blocks or any("assert " in code for code in blocks), "code shows nothing where none of it can fail"
    namespace: dict[str, Any] = {"__name__": page.stem}
    with torch.random.fork_rng():
        for code in blocks:
            exec(compile(code, str(page), "exec"), namespace)
    for made in tmp_path.glob("*.png"):  # but for rounding on another processor
        with Image.open(made) as new, Image.open(page.parent / made.name) as shown:
            assert new.size == shown.size, made.name
            assert max(ImageStat.Stat(ImageChops.difference(new, shown)).mean) < 2, made.name


def lend(folder: Path) -> None:
    """Make what a reader has: the checkout, downloaded data, and small files of what is prepared."""
    for name in ("configs", "README.md", "LICENSE", "docs", "lm"):
        os.symlink(ROOT / name, folder / name)
    for name in ("data", "openwebtext/plain_text", "fineweb-edu/sample/10BT"):
        (folder / name).mkdir(parents=True)
    for name in ("tinyshakespeare.txt", "names.txt", "gpt2.tiktoken"):
        if name not in MISSING:
            os.symlink(REFERENCE / name, folder / "data" / name)
    for name in ("openwebtext/plain_text", "fineweb-edu/sample/10BT"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / name / "0.parquet")


@pytest.mark.parametrize(("page", "commands"), cases())
def test_commands(
    lm: Callable[..., tuple[int, str, str]],
    data_for: Callable[[dict[str, Any]], list[object]],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: Path,
    commands: list[str],
) -> None:
    """A line that is one `lm` command runs in this process, which saves its start; what a shell must read, in bash."""
    place = workplace / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("LM_DATA_HOME", str(place / "data"))
    monkeypatch.syspath_prepend(place)
    lend(place)
    os.symlink(workplace / "words.txt", place / "words.txt")  # which data_for makes where names.txt is missing
    for code in python_blocks(page):
        if name := re.search(r"# file: (\S+)", code):
            (place / name[1]).write_text(code)
    train = re.findall(r"^\t\$\(BIN\)/(lm .*configs/quickstart.yaml.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(train) == 1  # what `make train` has done before a reader comes to a page
    used = any("checkpoints/quickstart" in line or "--ckpt_path last" in line for line in commands)
    for line in [*(train if used else ()), *commands]:
        words = shlex.split(line.removeprefix("PYTHONPATH=. "))
        more: list[object] = [*FEW] if "fit" in words else []
        recipes = [word for word in words if word.startswith("configs/") and "prepare" not in word]
        if MISSING and recipes:
            more += data_for(yaml.safe_load(Path(recipes[0]).read_text()))
        if "gpt2.tiktoken" in MISSING and "configs/prepare/" in line:
            more += ["--tokenizer", "byte"]
        # other ranks are started as this process was, and --print_config ends its process
        shell = words[0] != "lm" or {"|", "--trainer.devices", "--print_config"} & {*words}
        code, _, err = bash(line, more) if shell else lm(*words[1:], *more)
        assert code == 0, f"{line}\n{err}"
    ignored = {line.strip("/*") for line in (ROOT / ".gitignore").read_text().splitlines()} | {"data", "configs"}
    left = {path.name for path in place.iterdir() if not path.is_symlink()} - {"__pycache__"}
    assert left <= ignored, "the examples leave files that git does not ignore"


def bash(line: str, more: list[object]) -> tuple[int, str, str]:
    """Run a line in a shell, whose `lm` is this one; returns what `lm` does in this process."""
    program = shlex.quote(sys.executable) + " -m lm"
    command = re.sub(rf"\blm (?={'|'.join(COMMANDS)})", f"{program} ", line)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["bash", "-c", f"set -eo pipefail\n{command} {' '.join(map(str, more))}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_what_is_named_is_there(page: Path) -> None:
    """Recipes, benchmarks and their options, scripts of clusters: in blocks that do not run, too, and in prose."""
    text = page.read_text()
    named = re.findall(r"(?<![\w/.-])((?:configs|cluster|benchmarks|lm|tests)/[\w/.-]*\w)", text)
    there = [name for name in named if (ROOT / name).exists() or list(ROOT.glob(f"{name}.*")) or "NAME" in name]
    assert sorted({*named} - {*there}) == []
    for script, options in re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", text):
        known = (ROOT / script).read_text()
        ours = [option for option in re.findall(r"--[\w.]+", options) if not option.startswith("--model")]
        assert [option for option in ours if f'"{option}"' not in known] == [], script


def test_each_benchmark_is_in_the_documents() -> None:
    text = "".join(page.read_text() for page in PAGES)
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - HELPERS
    assert sorted(name for name in names if f"benchmarks/{name}.py" not in text) == []


def slug(heading: str) -> str:
    """Return the anchor that a heading has on the site and on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        goal = page.parent / target if target else page
        assert goal.exists(), target
        assert page not in DOCS or goal.resolve() in (*DOCS, *PICTURES), f"{target} is not on the site"
        if anchor:
            headings = re.findall(r"^#+ (.*)", goal.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_make_targets_exist(page: Path) -> None:
    """A command is what stands between backticks or begins a line of code; "to make to order" is none."""
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE))
    assert page.stem != "README" or {"train", "test"} <= named
    assert [name for name in named if f"\n{name}:" not in makefile] == []


def test_readme_is_short_and_maps_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for front in (text, (ROOT / "docs/index.md").read_text()):
        links = {Path(target).stem for target in re.findall(r"\]\(([^)#]+\.md)", front)}
        assert {page.stem for page in DOCS} - {"index"} <= links


def test_the_house_is_drawn_as_it_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = re.findall(r"^```mermaid\n.*?^```\n", text, flags=re.DOTALL | re.MULTILINE)
    assert drawn == [house.drawing()], "python benchmarks/figures.py house draws it anew"
    assert len(re.findall("-->", drawn[0])) < 20


def test_a_circle_of_packages_is_not_drawn() -> None:
    assert house.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    with pytest.raises(ValueError, match="a circle of imports: a, b"):
        house.reduced({"a": {"b"}, "b": {"a"}, "c": {"a"}})


PAGE = """# Figures

```bash title="python benchmarks/figures.py speed"
printf '| what | rounds | here | unit |\\n| --- | --- | --- | --- |\\n| a | 3 | 2 | s |\\n| c | 1 | 5 | s |\\n'
echo nothing that is a table
```

| what | here | rounds |
| --- | --- | --- |
| a | 1 | – |
| b | 7 | 9 |

```bash title="python benchmarks/figures.py drawn"
printf 'drawing\\n```text\\nnew\\n```\\n'
```

```text
old
```

Below.
"""


def test_a_command_renews_its_rows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert figures.renew("speed", 1, (page,)) == page
    table = "| what | here | rounds |\n| --- | --- | --- |\n| a | 2 | 3 |\n| b | 7 | 9 |\n| c | 5 | 1 |\n"
    assert f"\n\n{table}\n```bash" in page.read_text()  # b stays as it was, unit has no column
    figures.renew("drawn", None, (page,))
    assert page.read_text().endswith("```text\nnew\n```\n\nBelow.\n")
    before = page.read_text()
    with pytest.raises(ValueError, match="neither a Markdown table nor"):
        figures.renew("speed", 2, (page,))
    with pytest.raises(ValueError, match="two columns of one name: what, p95, p95"):
        figures.merged(before, "| what | p95 | p95 |\n| --- | --- | --- |\n| a | 1 | 2 |\n")
    assert page.read_text() == before


def test_every_block_that_names_a_figure_has_a_table() -> None:
    titled = re.compile(r'^```bash title="python benchmarks/figures\.py ([\w-]+)"', flags=re.MULTILINE)
    named = [name for page in figures.PAGES for name in titled.findall(page.read_text())]
    assert sorted(named) == sorted({figure.name for figure in figures.find()})
    assert {"published", "overhead", "scaling", "faults", "house"} <= {*named}
