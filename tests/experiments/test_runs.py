import fcntl
import json
from pathlib import Path

import pytest
import yaml

from lm.errors import UserError
from lm.experiments import runs

HEAD = "step,train/loss,train/learning_rate,train/tokens,train/tokens_per_second,val/loss,val/bits_per_byte\r\n"


def make(root: Path, name: str, rows: int = 3, **settings: object) -> Path:
    logs = root / "logs" / name
    logs.mkdir(parents=True)
    (root / "checkpoints" / name).mkdir(parents=True)
    body = "".join(f"{i},{5 - i},0.1,{i * 10},10,{6 - i},{7 - i}\r\n" for i in range(1, rows + 1))
    (logs / "metrics.csv").write_text(HEAD + body, newline="")
    recipe = {"name": name, "trainer": {"max_steps": 3}, "data": {"class_path": "D", "init_args": settings}}
    (logs / "config.yaml").write_text(yaml.safe_dump(recipe))
    return logs


def test_figures_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a")
    (tmp_path / "logs/a/run.json").write_text(json.dumps({"parameters": 7, "command": "lm fit", "commit": "abc"}))
    for said in ("a", "logs/a", "checkpoints/a", "logs/a/metrics.csv", str(tmp_path / "checkpoints/a")):
        ((run,), others) = runs.find([said])
        assert not others and run.name == "a"
        figures = run.figures()
        assert figures["state"] == "finished" and figures["parameters"] == 7 and figures["FLOPs"] == 6 * 7 * 30
        assert (figures["validation loss"], figures["best validation loss"], figures["at step"]) == (3, 3, 3)
        assert figures["seconds of training"] == 3 and figures["commit"] == "abc"


def test_a_run_goes_on_or_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a", rows=2)
    ((run,), _) = runs.find(["a"])
    assert run.state == "stopped; 3 were wanted"
    with (tmp_path / "checkpoints/a/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.state == "goes on"


def test_settings_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a", batch_size=1, corpus="x")
    make(tmp_path, "b", batch_size=2, corpus="x")
    make(tmp_path, "c", batch_size=2, corpus="x")
    (tmp_path / "logs/c/config.yaml").write_text("}{ damaged")
    found, _ = runs.find(["a", "b", "c"])
    assert runs.differing(found) == {"data.batch_size": [1, 2, None]}


def test_the_recipe_of_the_last_start_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logs = make(tmp_path, "a", batch_size=1)
    for number in (2, 10):
        (logs / f"config-{number}.yaml").write_text(f"data: {{init_args: {{batch_size: {number}}}}}")
    assert runs.find(["a"])[0][0].settings == {"data.batch_size": 10}


def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a")
    (tmp_path / "checkpoints/README.md").write_text("where checkpoints are")
    assert runs.find(["checkpoints/README.md", "checkpoints/a"])[1] == ["checkpoints/README.md"]
    with pytest.raises(UserError, match="README.md: no run and no sweep"):
        runs.find(["checkpoints/README.md"])
    with pytest.raises(UserError, match="nowhere: there is no such run"):
        runs.find(["a", "nowhere"])


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("x", "y"):
        make(tmp_path / place, "a")
    monkeypatch.chdir(tmp_path)
    assert [run.name for run in runs.find(["x/logs/a", "y/logs/a", "x/checkpoints/a"])[0]] == ["x/logs/a", "y/logs/a"]
