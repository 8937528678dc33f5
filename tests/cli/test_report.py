"""`lm report` of real runs, read back from the file that it writes."""

import html
import json
import re
import shutil
from pathlib import Path

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
    assert "src=" not in text and "<link" not in text and "url(" not in text, "it must need no network"
    shown = html.unescape(text)
    assert "model.optimizer.lr" in shown and "<h2>Samples</h2>" in shown
    assert lm("report", "one")[0] == 0, "a report of lm's is replaced"
    (workplace / "report.html").write_text("mine")
    code, _, err = lm("report", "one")
    assert code == 2 and "report.html: it is there already" in err and (workplace / "report.html").read_text() == "mine"
    code, out, err = lm("report", "one", "two", "--text")
    assert code == 0 and "model.optimizer.lr    0.01" in out and "validation A one  B two" in out, err


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
