"""What is tried next follows from the storage, the seed and the number alone."""

from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState

from lm.errors import UserError
from lm.experiments import spec
from lm.experiments.study import Lock, Trials, open_storage

SETTINGS = {
    "a": {"low": 1e-3, "high": 1.0, "log": True},
    "kind": [{"class_path": "A"}, {"class_path": "B"}],
    "kind.x": {"low": 1, "high": 9, "when": {"kind": {"class_path": "B"}}},
}


def trials(folder: Path, node: int = 0, **changes: object) -> Trials:
    folder.mkdir(exist_ok=True)
    found = spec.parse({"recipe": "r.yaml", "settings": SETTINGS, "sampler": "tpe", **changes}, {})
    return Trials(found, open_storage(None, folder), "s", Lock(folder / ".choosing.lock"), node)


def played(folder: Path, count: int, *, reopened: bool, **changes: object) -> list[dict[str, object]]:
    """Return the settings of so many trials, each completed with a value that follows from them."""
    study = trials(folder, **changes)
    for _ in range(count):
        study = trials(folder, **changes) if reopened else study
        trial = study.add()
        assert trial is not None
        study.end(trial, TrialState.COMPLETE, float(trial.params.get("a", 0)) + len(trial.params))
    return [study.values(trial) for trial in study.all()]


def test_a_sweep_that_is_started_again_chooses_the_same(tmp_path: Path) -> None:
    undisturbed = played(tmp_path / "a", 14, reopened=False)
    assert undisturbed == played(tmp_path / "b", 14, reopened=True)
    assert undisturbed != played(tmp_path / "c", 14, reopened=False, seed=1)
    assert all(("kind.x" in one) == (one["kind"] == {"class_path": "B"}) for one in undisturbed)
    assert len({repr(one) for one in undisturbed}) == 14


def test_no_combination_is_tried_twice_and_a_grid_ends(tmp_path: Path) -> None:
    settings = {"x": [1, 2, 3], "y": [True, None]}
    for sampler in ("grid", "random", "tpe"):
        study = trials(tmp_path / sampler, settings=settings, sampler=sampler)
        for _ in range(6):
            trial = study.add()
            assert trial is not None
            study.end(trial, TrialState.FAIL)  # one that failed is not repeated either
        assert study.add() is None
        assert len({repr(study.values(trial)) for trial in study.all()}) == 6


def test_a_storage_of_another_sweep_is_refused_with_what_differs(tmp_path: Path) -> None:
    trials(tmp_path / "a").add()
    trials(tmp_path / "a", trials=99)
    with pytest.raises(UserError, match=r"of another sweep \(seed null → 3\): say another name"):
        trials(tmp_path / "a", seed=3)
    with pytest.raises(UserError, match=r"settings.a.high 1.0 → 2.0"):
        trials(tmp_path / "a", settings={**SETTINGS, "a": {**SETTINGS["a"], "high": 2.0}})


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    study = trials(tmp_path / "a")
    study.add()
    journal = tmp_path / "a" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker_')
    assert len(trials(tmp_path / "a").all()) == 1
    assert journal.read_bytes() == whole


def test_whether_a_trial_is_hopeless_is_of_its_step_alone(tmp_path: Path) -> None:
    study = trials(tmp_path / "a", pruner="median")
    for _ in range(5):
        trial = study.add()
        for step, value in ((10, 1.0), (20, 0.1)):
            study.report(trial, step, value)
        study.end(trial, TrialState.COMPLETE, 1.0)
    trial = study.add()
    study.report(trial, 10, 0.5)
    study.report(trial, 20, 0.4)  # stored by a process that was then killed
    assert (study.hopeless(trial, 10), study.hopeless(trial, 20)) == (False, True)


def test_a_storage_that_cannot_be_opened(tmp_path: Path) -> None:
    for url in ("sqlite:////nowhere/x.db", "nonsense", "mysql://x"):
        with pytest.raises(UserError, match=r"^storage "):
            open_storage(url, tmp_path)
