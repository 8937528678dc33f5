"""`lm report` of real runs, read back from the file that it writes."""

import base64
import html
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image

from lm.cli import report
from tests.conftest import ROOT


def charts(path: Path) -> dict[str, dict]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return {chart["id"]: chart for chart in json.loads(found[1])}


def test_a_report_of_runs(lm, workplace: Path) -> None:
    for name, rate in (("one", 1e-2), ("two", 1e-3)):
        words = ("--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", rate)
        code, _, err = lm("fit", "--config", "tiny.yaml", "--name", name, *words)
        assert code == 0, err
    code, out, err = lm("report", "one", "two", "--json")
    assert (code, json.loads(out.splitlines()[-1])) == (0, {"path": "report.html"}), err
    found = charts(workplace / "report.html")
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "update_ratio"} <= found.keys()
    lines = {line["label"]: line for line in found["loss"]["lines"]}
    assert set(lines) == {f"{run} {kind}" for run in ("one", "two") for kind in ("training", "validation")}
    assert lines["one validation"]["steps"] == [4, 8, 12] and lines["two training"]["tokens"][-1] == 12 * 64
    text = (workplace / "report.html").read_text()
    assert not re.search(r'src="(?!data:)|<link|url\(', text), "it must need no network"
    names = {"attention block 0", "averages", "dlogits", "embedding"}
    assert names == set(drawn(workplace / "report.html")) and "best.ckpt and the first batch (one)" in text
    shown = html.unescape(text)
    assert "model.optimizer.lr" in shown and "<h2>Samples</h2>" in shown
    assert lm("report", "one")[0] == 0, "a report of lm's is replaced"
    (workplace / "report.html").write_text("mine")
    code, _, err = lm("report", "one")
    assert code == 2 and "report.html: it is there already" in err and (workplace / "report.html").read_text() == "mine"
    code, out, err = lm("report", "one", "two", "--text")
    assert code == 0 and "model.optimizer.lr    0.01" in out and "validation A one  B two" in out, err


def test_pictures_need_the_corpus_and_a_network_of_some_size(lm, workplace: Path, monkeypatch) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml")
    assert code == 0, err
    (workplace / "text.txt").rename(workplace / "moved.txt")
    monkeypatch.setattr(report, "LARGEST", 10**6)
    code, _, err = lm("report", "tiny")
    assert code == 0 and not drawn(workplace / "report.html"), err
    assert "tiny: no pictures: corpus text.txt: no such file" in html.unescape((workplace / "report.html").read_text())
    monkeypatch.setattr(report, "LARGEST", 1000)
    assert lm("report", "tiny")[0] == 0
    assert "tiny: no pictures of more than 1,000 parameters" in (workplace / "report.html").read_text()


def drawn(path: Path) -> dict[str, Image.Image]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', path.read_text())
    return {name: Image.open(BytesIO(base64.b64decode(data))) for name, data in found}


def test_a_report_of_what_earlier_releases_wrote(lm, workplace: Path) -> None:
    shutil.copytree(ROOT / "tests/fixtures/single", workplace / "checkpoints/old")
    code, out, err = lm("report", "checkpoints/old", "--text")
    assert code == 0 and re.search(r"parameters +[\d,]+\n", out) and "validation loss" in out, err


def test_nothing_to_report(lm, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    for words in ((), ("nowhere",), ("empty",), ("tiny.yaml",), ("x\0y",), ("one", "--text", "--json")):
        code, out, err = lm("report", *words)
        assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, words
    assert not (workplace / "report.html").exists()
