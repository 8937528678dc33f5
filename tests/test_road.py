"""The whole road, from documents to an assistant: each stage runs, and prints what the page's transcript shows."""

import re
from pathlib import Path

import pytest

from benchmarks import road
from tests.conftest import ROOT

CHAT = "lm chat"


def shapes(lines: list[str]) -> list[str]:
    """Return lines with N in place of numbers, and of what a network says."""
    found, talks = [], False
    for line in lines:
        talks = CHAT in line if line.startswith("$ ") else talks
        found.append("a turn" if talks and not line.startswith("$ ") else re.sub(r"-?\d[\d,.e+-]*|\bnan\b", "N", line))
    return [re.sub(r" +", " ", line) for line in found]


@pytest.mark.slow
def test_each_stage_prints_what_the_page_shows(reference: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/posttraining.md").read_text()
    shown = re.search(r"^```console\n(\$ lm fit.*?)^```", page, re.DOTALL | re.MULTILINE)[1].splitlines()
    assert shapes(list(road.transcript(tmp_path, 8))) == shapes(shown)
    assert [line[2:] for line in shown if line.startswith("$ ")] == [*road.STAGES]
