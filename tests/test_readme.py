"""README's commands and code are run as they stand, in order, on a checkout; trainings are cut to a few steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lm.cli import COMMANDS
from tests.conftest import REFERENCE, ROOT

README = (ROOT / "README.md").read_text()
FEW = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]


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


def test_commands_and_code(tmp_path: Path) -> None:
    os.symlink(ROOT / "configs", tmp_path / "configs")
    for name in ("README.md", "LICENSE", "docs", "lm"):
        os.symlink(ROOT / name, tmp_path / name)
    for code in blocks("python"):
        (tmp_path / re.search(r"# file: (\S+)", code)[1]).write_text(code)
    lend_data(tmp_path)
    program = shlex.quote(sys.executable) + " -m lm"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LM_DATA_HOME": str(tmp_path / "data")}
    train = re.findall(r"^\t\$\(BIN\)/(lm .*configs/quickstart.yaml.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = train + [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(train) == 1  # what `make train` has done before a reader comes to the first command
    assert len(commands) >= 10
    script = ["set -e", f"export PYTHONPATH={ROOT}"]
    for line in commands:
        few = " ".join(FEW) if " fit " in line else ""
        command = line.replace("PYTHONPATH=.", f"PYTHONPATH=.:{ROOT}")
        if "configs/prepare/" in line and not (tmp_path / "data/gpt2.tiktoken").exists():
            few = "--tokenizer byte"
        script.append(re.sub(rf"\blm (?={'|'.join(COMMANDS)})", f"{program} ", command) + f" {few}")
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints/average/best.ckpt").exists()
    ignored = {line.strip("/*") for line in (ROOT / ".gitignore").read_text().splitlines()} | {"data", "configs"}
    left = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
    assert left <= ignored, "the examples leave files that git does not ignore"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"train", "test"} <= named
    assert [name for name in named if f"\n{name}:" not in makefile] == []
