"""The python blocks of every page under docs/ run as they stand, in order, and their assertions hold."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(page: Path) -> list[str]:
    """Return a page's python blocks, each moved down to its own line so that a failure names the page's line."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def test_there_are_blocks() -> None:
    assert any(blocks(page) for page in PAGES)
    assert blocks(ROOT / "docs/attention.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert any("assert " in code for code in blocks(page)), "a page shows nothing where none of its blocks can fail"
    namespace: dict[str, Any] = {"__name__": page.stem}
    with torch.random.fork_rng():
        for code in blocks(page):
            exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
