"""The whole road, from documents to an assistant: each stage runs, and prints what the page's transcript shows."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import road
from tests.conftest import ROOT

CHAT = "lm chat"
FEW = ("--trainer.max_steps", 8, "--trainer.val_check_interval", 8)


def shapes(lines: list[str]) -> list[str]:
    """Return lines with N in place of numbers, and of what a network says."""
    found, talks = [], False
    for line in lines:
        talks = CHAT in line if line.startswith("$ ") else talks
        found.append("a turn" if talks and not line.startswith("$ ") else re.sub(r"-?\d[\d,.e+-]*|\bnan\b", "N", line))
    return [re.sub(r" +", " ", line) for line in found]


@pytest.mark.slow
def test_each_stage_prints_what_the_page_shows(
    lm: Callable[..., tuple[int, str, str]], workplace: Path, reference: Path
) -> None:
    """With few steps; in this process what need not be read by a shell."""

    def run(command: str) -> str:
        if "|" in command:
            return road.in_shell(command, workplace)
        code, out, err = lm(*shlex.split(command)[1:], *FEW)
        assert code == 0, err
        return out

    os.symlink(ROOT / "configs", "configs")
    page = (ROOT / "docs/posttraining.md").read_text()
    shown = re.search(r"^```console\n(\$ lm fit.*?)^```", page, re.DOTALL | re.MULTILINE)[1].splitlines()
    assert shapes(list(road.transcript(run))) == shapes(shown)
    assert [line[2:] for line in shown if line.startswith("$ ")] == [*road.STAGES]
