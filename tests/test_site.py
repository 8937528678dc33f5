"""The documentation site: each page is there and can be searched, and nothing is loaded from elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

REPORTS = {path.stem for path in (ROOT / "docs").glob("*.html")}
PAGES = sorted(str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    words = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_each_page_is_there_and_in_the_map(site: Path) -> None:
    assert {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")} == {*PAGES, *REPORTS, "404"}
    front = (site / "index.html").read_text()
    assert [page for page in PAGES if page != "index" and f'href="./{page}.html"' not in front] == []


def test_search_finds_each_page(site: Path) -> None:
    items = json.loads((site / "search.json").read_text())["items"]
    assert {item["location"].split("#")[0].removesuffix(".html") or "index" for item in items} == {*PAGES}
    assert any("fsdp2" in item["text"] and item["location"].startswith("clusters") for item in items)
    settings = json.loads(re.search(r'<script id="__config"[^>]*>(.*?)</script>', (site / "usage.html").read_text())[1])
    assert (site / settings["search"]).is_file()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """A link to another server is for the reader to follow; scripts, styles, fonts and pictures are the site's own."""
    loaded = []
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?!a\b)\w+ [^>]*>", page.read_text()):
            loaded += re.findall(r"(?:src|href|srcset|data)=[\"']?((?:https?:)?//[^\"' >]+)", tag)
    for style in site.rglob("*.css"):
        loaded += re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", style.read_text())
    assert loaded == []
    # the theme's script loads these on pages that have a diagram or a formula
    assert [
        page.name for page in site.rglob("*.html") if re.search(r'class="(mermaid|arithmatex)', page.read_text())
    ] == []
