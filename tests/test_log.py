"""Lines for machines: LM_LOG=json makes an object of each, and metrics.prom is what Prometheus reads."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lm.training.loggers.log_files import MetricsProm, check
from tests.conftest import start
from tests.support.ranks import finish, run, write_recipe


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_LOG", "json")


@pytest.mark.slow
def test_all_that_a_run_prints_is_an_object_a_line(as_json: None, workplace: Path) -> None:
    words = ("--model.init_args.compile", "true", "--name", "one", "--trainer.log_every_n_steps", 5)
    no_compiler = {"CXX": "/no/compiler"}
    process = start("fit", "--config", "tiny.yaml", *words, cwd=workplace, fresh=True, environment=no_compiler)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in (out + err).splitlines()]
    assert {(line["run"], line["rank"]) for line in lines} == {("one", 0)}
    steps = {line["step"]: line["loss"] for line in lines if "gradient_norm" in line}
    assert [*steps] == [1, 5, 10, 12] and all(0 < loss < 10 for loss in steps.values())
    assert [line["step"] for line in lines if "val_loss" in line and "seconds" not in line] == [4, 8, 12]
    assert [line["level"] for line in lines if "model.compile" in line["message"]] == ["warning"]
    assert lines[0]["message"].startswith("GPT of") or lines[-1]["level"] == "warning"
    assert all(line["time"].endswith("Z") for line in lines)


def test_errors_are_objects_too_and_say_the_rank(as_json: None, lm, workplace: Path) -> None:
    code, out, err = lm("fit", "--config", "none.yaml")
    (line,) = map(json.loads, err.splitlines())
    assert code == line["exit_code"] == 2 and line["level"] == "error" and not out
    assert line["message"].startswith("--config none.yaml: No such file") and line["run"] is None
    write_recipe()
    process = run("two", 2, "--data.init_args.corpus", "gone.txt", "--watch.timeout", 4, cwd=workplace)
    _, err = process.communicate(timeout=60)
    lines = [json.loads(line) for line in err.splitlines()]
    assert process.returncode == 2 and {line["run"] for line in lines} == {"two"}
    assert {line["rank"] for line in lines} >= {0} and "gone.txt" in lines[0]["message"]


def test_people_see_no_json(lm, workplace: Path) -> None:
    out = lm("fit", "--config", "tiny.yaml")[1]
    assert "{" not in out and "step 12/12  loss" in out


def test_prometheus_reads_the_newest_values(workplace: Path) -> None:
    write_recipe()
    finish(run("two", 2, cwd=workplace))
    path = Path("logs/two/metrics.prom")
    found = {family.name: family.samples[0] for family in text_string_to_metric_families(path.read_text())}
    assert {"lm_step", "lm_train_loss", "lm_val_loss", "lm_train_tokens_per_second"} <= found.keys()
    assert found["lm_step"].value == 12 and found["lm_step"].labels == {"run": "two"}
    assert 0 < found["lm_train_loss"].value < 10
    assert [other.name for other in path.parent.glob("*.part")] == []


def test_a_reader_sees_a_whole_file_or_the_one_before(tmp_path: Path) -> None:
    """Read after every rename by way of an open file: what was replaced stays whole."""
    logger = MetricsProm(tmp_path / "run")
    logger.log_metrics({"train/loss": 2.0}, step=1)
    with logger.path.open() as before:
        logger.log_metrics({"val/loss": float("inf"), "train/loss": 1.0}, step=2)
        assert 'lm_train_loss{run="run"} 2.0' in before.read()
    families = {family.name: family for family in text_string_to_metric_families(logger.path.read_text())}
    assert families["lm_val_loss"].samples[0].value == float("inf") and families["lm_step"].samples[0].value == 2


def test_every_metric_has_a_name_that_prometheus_takes_and_no_two_the_same(tmp_path: Path) -> None:
    logger = MetricsProm(tmp_path / "run")
    logger.log_metrics({"val/größe": 1.0, "lr-AdamW": float("nan"), "val/loss": 2.0, "val.loss": 3.0}, step=1)
    lines = [line for line in logger.path.read_text().splitlines() if not line.startswith("#")]
    names = [re.match(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{run=\"run\"\} \S+$", line)[1] for line in lines]
    assert names == ["lm_step", "lm_val_gr__e", "lm_lr_AdamW", "lm_val_loss"]


def test_the_file_of_an_earlier_release_is_replaced(tmp_path: Path) -> None:
    logger = MetricsProm(tmp_path)
    logger.path.write_text('# TYPE lm_step gauge\nlm_step{run="run"} 4\n')
    check(tmp_path)
    logger.log_metrics({}, step=5)
    check(tmp_path)
    assert "} 5.0\n" in logger.path.read_text()
