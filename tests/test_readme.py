"""README's commands and code are run as they stand, in order, on a checkout; trainings are cut to a few steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lm.cli import COMMANDS
from tests.conftest import REFERENCE, ROOT

README = (ROOT / "README.md").read_text()
FEW = "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.limit_val_batches 2 --samples.max_new_tokens 8".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def lend_data(folder: Path) -> None:
    """Make small files of what the recipes of preparation read."""
    for name in ("data", "openwebtext/plain_text", "fineweb-edu/sample/10BT"):
        (folder / name).mkdir(parents=True)
    if (REFERENCE / "gpt2.tiktoken").is_file():
        os.symlink(REFERENCE / "gpt2.tiktoken", folder / "data/gpt2.tiktoken")
    for name in ("openwebtext/plain_text", "fineweb-edu/sample/10BT"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / name / "0.parquet")


@pytest.mark.parametrize("ranks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands_and_code(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch, ranks: bool) -> None:
    """A line that is one `lm` command runs in this process, which saves its start; what a shell must read, in bash."""
    place = workplace / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("LM_DATA_HOME", str(place / "data"))
    for name in ("configs", "README.md", "LICENSE", "docs", "lm"):
        os.symlink(ROOT / name, place / name)
    for code in blocks("python"):
        (place / re.search(r"# file: (\S+)", code)[1]).write_text(code)
    lend_data(place)
    train = re.findall(r"^\t\$\(BIN\)/(lm .*configs/quickstart.yaml.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(train) == 1  # what `make train` has done before a reader comes to the first command
    chosen = [block for block in blocks("bash") if ("--trainer.devices" in block) == ranks]  # which needs no other
    commands = train + [line for block in chosen for line in block.splitlines() if line.strip()]
    assert len(commands) >= (3 if ranks else 10)
    for line in commands:
        more = FEW if " fit " in line else []
        if "configs/prepare/" in line and not (place / "data/gpt2.tiktoken").exists():
            more = ["--tokenizer", "byte"]
        first, *words = shlex.split(line)
        # other ranks are started as this process was, and --print_config ends its process
        shell = first != "lm" or {"|", "--trainer.devices", "--print_config"} & {*words}
        code, _, err = bash(line, more) if shell else lm(*words, *more)
        assert code == 0, f"{line}\n{err}"
    assert (place / f"checkpoints/{'shards' if ranks else 'average'}").exists()
    ignored = {line.strip("/*") for line in (ROOT / ".gitignore").read_text().splitlines()} | {"data", "configs"}
    left = {path.name for path in place.iterdir() if not path.is_symlink()}
    assert left <= ignored, "the examples leave files that git does not ignore"


def bash(line: str, more: list[str]) -> tuple[int, str, str]:
    """Run a line in a shell, whose `lm` is this one; returns what `lm` does in this process."""
    program = shlex.quote(sys.executable) + " -m lm"
    command = re.sub(
        rf"\blm (?={'|'.join(COMMANDS)})", f"{program} ", line.replace("PYTHONPATH=.", f"PYTHONPATH=.:{ROOT}")
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"set -eo pipefail\n{command} {' '.join(more)}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist() -> None:
    """A command is what stands between backticks or begins a line of code; "to make to order" is none."""
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"train", "test"} <= named
    assert [name for name in named if f"\n{name}:" not in makefile] == []
