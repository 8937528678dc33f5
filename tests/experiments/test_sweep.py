"""Sweeps in processes of their own, which are killed, fail, and are compared."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from lm.checkpoints import checkpoint
from tests.support import sweeps

LONGER = {**sweeps.RECIPE, "trainer": {**sweeps.RECIPE["trainer"], "max_steps": 200, "val_check_interval": 20}}


def place(workplace: Path, name: str) -> Path:
    folder = workplace / name
    folder.mkdir()
    (folder / "text.txt").write_text((workplace / "text.txt").read_text())
    return folder


def undisturbed_and_killed(workplace: Path, count: int, kills: int, seed: int, pause: float) -> None:
    one, other = place(workplace, "one"), place(workplace, "other")
    for folder in (one, other):
        sweeps.write(folder, LONGER, trials=count, pruner="median")
    said = sweeps.run(one)
    draws, done = random.Random(seed), 0
    process = sweeps.begin(other)
    while process.poll() is None or process.returncode:
        if process.poll() is not None:
            assert process.returncode == -signal.SIGKILL, process.communicate()
            process = sweeps.begin(other)
        time.sleep(draws.uniform(0.2, pause))
        if done < kills:
            done += sweeps.kill(other, draws.choice(["sweep", "server", "trial"]))
    assert done, "nothing was killed"
    assert sweeps.picture(one) == sweeps.picture(other)
    sweeps.assert_same_weights(one / "sweeps/sweep", other / "sweeps/sweep")
    assert (one / "sweeps/sweep/best.yaml").read_bytes() == (other / "sweeps/sweep/best.yaml").read_bytes()
    assert said["trials"] == count and said["best"]["value"] == min(t.value for t in sweeps.trials(one) if t.value)


@pytest.mark.slow
def test_a_sweep_that_was_killed_ends_with_the_same_trials(workplace: Path) -> None:
    undisturbed_and_killed(workplace, count=4, kills=3, seed=3, pause=4)


@pytest.mark.long
def test_a_sweep_that_was_killed_twenty_times(workplace: Path) -> None:
    undisturbed_and_killed(workplace, count=8, kills=20, seed=4, pause=5)


@pytest.mark.slow
def test_variants_are_all_tried(lm, workplace: Path) -> None:
    """Each once, in their order; the best one's recipe has what it changes, and a report calls them by their names."""
    variants = {"as it is": {}, "fast and wide": {sweeps.RATE: 0.2, "data.batch_size": 8}, "slow": {sweeps.RATE: 1e-6}}
    sweeps.write(workplace, settings={}, variants=variants)
    found = sweeps.run(workplace)
    assert found["trials"] == found["complete"] == 3 and found["best"]["settings"] == {"variant": "fast and wide"}
    assert [trial.params["variant"] for trial in sweeps.trials(workplace)] == list(variants)
    best = yaml.safe_load((workplace / "sweeps/sweep/best.yaml").read_text())
    rate = best["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert (rate, best["data"]["init_args"]["batch_size"]) == (0.2, 8)
    code, out, err = lm("report", "sweeps/sweep", "--text")
    assert code == 0 and all(name in out for name in variants), err
    code, out, err = lm("report", "sweeps/sweep")
    assert code == 0 and all(name in (workplace / "report.html").read_text() for name in variants), err


@pytest.mark.slow
def test_steps_are_those_of_each_variant(workplace: Path) -> None:
    """Of all seeds together; numbers may be texts, as recipes may have them."""
    variants = {"short": {"trainer.max_steps": "20"}, "long": {"seed_everything": "5"}}
    sweeps.write(workplace, settings={}, variants=variants, seeds=2)
    assert sweeps.run(workplace)["complete"] == 2
    assert [trial.user_attrs["steps"] for trial in sweeps.trials(workplace)] == [40, 80]


@pytest.mark.slow
def test_the_best_recipe_trains_to_the_best_value(lm, workplace: Path) -> None:
    sweeps.write(workplace, seeds=2, at="best", trials=2)
    found = sweeps.run(workplace, "--workers", 2)
    assert found["trials"] == found["complete"] == 2 and found["best"]["recipe"] == "sweeps/sweep/best.yaml"
    losses = []
    for seed in (7, 8):
        code, _, err = lm("fit", "--config", "sweeps/sweep/best.yaml", "--name", seed, "--seed_everything", seed)
        assert code == 0, err
        table = (workplace / f"logs/{seed}/metrics.csv").read_text().splitlines()
        column = table[0].split(",").index("val/loss")
        losses.append(min(float(cell) for row in table[1:] if (cell := row.split(",")[column])))
    assert sum(losses) / 2 == found["best"]["value"]
    code, _, err = lm("report", "sweeps/sweep", "--json")
    assert code == 0, err
    page = (workplace / "report.html").read_text()
    assert "Settings that differ" in page and "History" in page and page.count("<svg") >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [({sweeps.RATE: [0.01, 1e30]}, "not finite"), ({"data.init_args.batch_size": [4, 1 << 20]}, "memory")],
)
def test_trials_that_fail_are_said_and_not_repeated(workplace: Path, settings: dict[str, Any], said: str) -> None:
    long = {**sweeps.RECIPE, "data": {**sweeps.DATA, "init_args": {**sweeps.DATA["init_args"], "block_size": 256}}}
    sweeps.write(workplace, long, settings=settings, trials=5, sampler="random")
    process = sweeps.begin(workplace, "--json")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    found = yaml.safe_load(out.splitlines()[-1])
    assert (found["trials"], found["complete"], found["failed"]) == (2, 1, 1)
    assert re.search(f"failed: .*{said}", err), err
    before = sweeps.picture(workplace)
    sweeps.run(workplace)
    assert sweeps.picture(workplace) == before


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_trial(workplace: Path) -> None:
    """Real small file systems, on which other files leave more and more room: the sweep ends as an undisturbed one."""
    one, other = place(workplace, "one"), place(workplace, "other")
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(other)]
    if os.getuid() or subprocess.run(command).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        for folder in (one, other):
            sweeps.write(folder, trials=4)
        (other / "text.txt").write_bytes((one / "text.txt").read_bytes())
        sweeps.run(one)
        ends = []
        for room in (4, 200, 400, 4000):  # KiB
            filled = shutil.disk_usage(other).free - room * 1024
            (other / "others").write_bytes(b"\0" * max(0, filled))
            process = sweeps.begin(other)
            _, err = process.communicate(timeout=100)
            ends.append((process.returncode, [line for line in err.splitlines() if line.startswith("error: ")]))
            (other / "others").unlink()
        assert ends[-1] == (0, []) and ends[0][0] == 2, ends
        for code, errors in ends:
            assert code == 0 or (code == 2 and len(errors) == 1 and "No space left" in errors[0]), ends
        assert sweeps.picture(one) == sweeps.picture(other)
        sweeps.assert_same_weights(one / "sweeps/sweep", other / "sweeps/sweep")
    finally:
        subprocess.run(["umount", str(other)], check=True)


@pytest.mark.slow
def test_what_is_wrong_ends_a_sweep_before_its_first_trial(workplace: Path) -> None:
    cases = (
        (
            {"settings": {"data.init_args.batch_sise": [1, 2]}},
            "sweep.yaml: unknown option or key data.init_args.batch_sise: did you mean data.init_args.batch_size?",
        ),
        ({"settings": {"data.init_args.batch_size": [4, 0]}}, "sweep.yaml: data.batch_size is 0"),
        (
            {"settings": {}, "variants": {"a": {}, "the second": {"data.batch_sise": 1}}},
            "sweep.yaml: with variant the second: unknown option or key data.init_args.batch_sise: did you mean",
        ),
        (
            {"settings": {}, "variants": {"a": {}, "b": {"data.batch_size": 0}}},
            "sweep.yaml: with variant b: data.batch_size",
        ),
        ({"settings": {}, "variants": {"a": {}, "b": {"ckpt_path": "last"}}}, "sweep.yaml: with variant b: "),
        (
            {
                "variants": {"a": {}, "b": {"data.batch_size": 2}},
                "settings": {"data.block_size": {"choices": [8, 9, -5], "when": {"variant": "b"}}},
            },
            "sweep.yaml: with variant b: data.block_size is -5",
        ),
        ({"settings": {"data.init_args.corpus": ["text.txt", "none.txt"], "data.init_args.seed": [1, 2]}}, "seed"),
    )
    for changes, said in cases:
        sweeps.write(workplace, **changes)
        process = sweeps.begin(workplace)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and said in err and len(err.splitlines()) == 1, err
        assert "settings-0" not in err, err  # a file of lm's own
        assert not (workplace / "sweeps").exists()


@pytest.mark.slow
def test_a_second_sweep_in_a_folder_is_refused_and_a_stopped_one_goes_on(workplace: Path) -> None:
    sweeps.write(workplace, {**LONGER, "trainer": {**LONGER["trainer"], "max_steps": 100_000}}, trials=2)
    first = sweeps.begin(workplace)
    while not list((workplace / "sweeps").rglob("last.ckpt")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    second = sweeps.begin(workplace)
    _, err = second.communicate(timeout=100)
    assert second.returncode == 2 and "another lm sweep is at work in it" in err and len(err.splitlines()) == 1
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=100)
    assert first.returncode == 143 and "the same command continues" in err, err
    assert not sweeps.processes_of(workplace)
    assert [trial.state.name for trial in sweeps.trials(workplace)] == ["RUNNING"]


@pytest.mark.slow
def test_a_trial_that_was_killed_where_it_was_to_stop_goes_no_further(workplace: Path) -> None:
    sweeps.write(workplace, at=20, trials=1)
    sweeps.run(workplace)
    before = sweeps.picture(workplace)
    journal = workplace / "sweeps/sweep/journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    ends = 6  # Optuna's number for a trial's state
    journal.write_bytes(b"".join(line for line in lines if json.loads(line)["op_code"] != ends))
    assert sweeps.trials(workplace)[0].state.name == "RUNNING"
    sweeps.run(workplace)
    assert sweeps.picture(workplace) == before
    assert checkpoint.peek(workplace / "sweeps/sweep/checkpoints/trial-0000/last.ckpt").step == 20


WAYS = {
    "gp": {"sampler": "gp", "trials": 12},
    "hyperband": {"pruner": "hyperband", "trials": 6},
    "wilcoxon": {"pruner": "wilcoxon", "seeds": 3, "trials": 3},
    "random": {"sampler": "random", "pruner": "median", "trials": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_a_sweep_in_two_parts_is_one_in_a_single(workplace: Path, name: str) -> None:
    """By each sampler and pruner that no other test has."""
    way = WAYS[name]
    whole, parts = place(workplace, "whole"), place(workplace, "parts")
    sweeps.write(whole, **way)
    found = sweeps.run(whole)
    assert found["trials"] == way["trials"] and found["failed"] == 0
    for trials in (way["trials"] // 2, way["trials"]):
        sweeps.write(parts, **{**way, "trials": trials})
        sweeps.run(parts)
    assert sweeps.picture(whole) == sweeps.picture(parts)
    sweeps.assert_same_weights(whole / "sweeps/sweep", parts / "sweeps/sweep")


@pytest.mark.slow
def test_all_ranks_of_a_trial_stop_where_it_is_told_to(workplace: Path) -> None:
    trainer = {**sweeps.RECIPE["trainer"], "devices": 2, "strategy": "ddp"}
    sweeps.write(workplace, {**sweeps.RECIPE, "trainer": trainer}, at=20, trials=2)
    found = sweeps.run(workplace)
    assert (found["complete"], found["failed"]) == (2, 0)
    for trial in sweeps.trials(workplace):
        assert list(trial.intermediate_values) == [10, 20]
        assert checkpoint.peek(workplace / f"sweeps/sweep/checkpoints/trial-{trial.number:04d}/last.ckpt").step == 20
    assert not sweeps.processes_of(workplace)
