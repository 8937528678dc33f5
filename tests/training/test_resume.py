"""Stopped and continued equals uninterrupted, to the last bit."""

import fcntl
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_kinds import listens
from lm import storage
from lm.checkpoints import checkpoint
from lm.errors import UserError
from lm.training.loggers.log_files import read_csv
from tests.conftest import start
from tests.support.cases import often
from tests.support.runs import assert_equal, assert_runs_equal, state, stop_with, table


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stops", often([[3, 6, 7], [5], [4, 8], [11]]))
def test_stopping_and_resuming_changes_no_bit(lm, workplace: Path, stops: list[int], accumulate: int) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--trainer.accumulate_grad_batches", accumulate]
    assert lm(*recipe, "--name", "whole")[0] == 0
    for stop in stops:
        code = lm(*recipe, "--name", "parts", "--ckpt_path", "auto", *stop_with("StopAt", stop))[0]
        assert code == 143
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")


def test_a_stop_inside_validation_is_made_up_for(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--data.init_args.val_fraction", "0.9"]
    assert lm(*recipe, "--name", "whole")[0] == 0
    code = lm(*recipe, "--name", "parts", *stop_with("StopInValidation", 8))[0]
    assert code == 143
    assert table("parts")[-1]["step"] == "8" and not table("parts")[-1]["val/loss"]
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")


def test_a_finished_run_can_be_extended(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--model.init_args.schedule", "lm.training.schedules.Constant"]
    assert lm(*recipe, "--name", "whole", "--trainer.max_steps", 20)[0] == 0
    assert lm(*recipe, "--name", "parts")[0] == 0
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "last")[0] == 0  # nothing left to do
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "last", "--trainer.max_steps", 20)[0] == 0
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))


def test_a_finished_run_whose_last_checkpoint_was_damaged_gets_a_whole_one(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--checkpoint.every_n_steps", 6]
    assert lm(*recipe)[0] == 0
    last = Path("checkpoints/tiny/last.ckpt")
    whole = last.read_bytes()
    os.truncate(last, 1000)
    code, out, _ = lm(*recipe, "--ckpt_path", "auto")
    assert code == 0 and "last.ckpt is damaged" in out and "done: step 12" in out
    assert last.read_bytes() == whole


def test_a_new_learning_rate_wins_over_the_checkpoints(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--model.init_args.schedule", "lm.training.schedules.Constant"]
    lm(*recipe)
    faster = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0.5]
    assert lm(*recipe, *faster, "--ckpt_path", "last", "--trainer.max_steps", 14)[0] == 0
    assert [float(row["train/learning_rate"]) for row in table("tiny")[-3:]] == [1e-3, 0.5, 0.5]


def test_going_back_to_an_earlier_checkpoint_makes_it_the_newest(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml"]
    lm(*recipe)
    back = ["--ckpt_path", "checkpoints/tiny/step=0000005.ckpt"]
    assert lm(*recipe, *back, "--trainer.max_steps", 8)[0] == 0
    assert [int(row["step"]) for row in table("tiny")] == [*range(1, 9)]
    assert next(iter(checkpoint.newest_first(Path("checkpoints/tiny")))).name == "last.ckpt"
    assert checkpoint.peek(Path("checkpoints/tiny/last.ckpt")).step == 8


@pytest.mark.parametrize("signum", often([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_stops_at_a_step_with_a_checkpoint(lm, workplace: Path, signum: int) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--model.init_args.schedule", "lm.training.schedules.Constant"]
    process = start(*recipe, "--name", "parts", "--trainer.max_steps", 100_000, cwd=workplace)
    wait_for(workplace / "logs/parts/metrics.csv", process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    step = checkpoint.peek(workplace / "checkpoints/parts/last.ckpt").step
    assert f"stopped by {signal.Signals(signum).name} after step {step}" in err
    assert 0 < step < 100_000
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "last", "--trainer.max_steps", step + 10)[0] == 0
    assert lm(*recipe, "--name", "whole", "--trainer.max_steps", step + 10)[0] == 0
    assert_runs_equal("whole", "parts")


def wait_for(path: Path, process: Any) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_keeping_the_last_ones_keeps_those_of_the_newest_start(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml", "--checkpoint.every_n_steps", 2]
    lm(*recipe)
    back = ["--ckpt_path", "checkpoints/tiny/step=0000004.ckpt", "--trainer.max_steps", 8, "--checkpoint.keep_last", 2]
    assert lm(*recipe, *back)[0] == 0
    kept = sorted(path.name for path in Path("checkpoints/tiny").glob("step*"))
    assert kept == ["step=0000006.ckpt", "step=0000008.ckpt"]


def test_a_branch_has_a_best_checkpoint_of_its_own(lm, workplace: Path) -> None:
    recipe = ["fit", "--config", "tiny.yaml"]
    lm(*recipe)
    start_from = ["--ckpt_path", "checkpoints/tiny/step=0000010.ckpt", "--model.init_args.net.init_args.dropout", 0.9]
    assert lm(*recipe, *start_from, "--name", "branch")[0] == 0
    assert checkpoint.peek(Path("checkpoints/branch/best.ckpt")).step == 12


def test_a_signal_to_the_whole_group_with_workers(workplace: Path) -> None:
    """As SLURM and systemd send it: the loader's workers get it too, and must not die before the trainer stops."""
    words = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", 100_000, "--data.init_args.num_workers", 1]
    process = start(*words, cwd=workplace, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_for(workplace / "logs/tiny/metrics.csv", process)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143, err
    assert checkpoint.damage(workplace / "checkpoints/tiny/last.ckpt") is None


@pytest.mark.parametrize(
    ("times", "steps"),
    [pytest.param(6, 1000, marks=pytest.mark.slow), pytest.param(20, 3000, marks=pytest.mark.long)],
)
def test_killed_at_random_moments_loses_an_interval_and_what_was_being_written(
    lm, workplace: Path, times: int, steps: int
) -> None:
    """SIGKILL, from the start of the process to its end; then the run is as if nothing had been."""
    recipe = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", steps, "--trainer.val_check_interval", 50]
    recipe += ["--checkpoint.every_n_steps", 20, "--checkpoint.keep_last", 3]
    assert lm(*recipe, "--name", "whole")[0] == 0
    draw, kills, lost = random.Random(1), 0, []
    folder, logs = workplace / "checkpoints/parts", workplace / "logs/parts"
    while kills < times:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = start(*recipe, "--name", "parts", "--ckpt_path", "auto", cwd=workplace, **silent)
        before = len(list(logs.glob("config*.yaml")))
        while process.poll() is None and len(list(logs.glob("config*.yaml"))) == before:
            time.sleep(0.01)  # importing takes the longest: count from the moment that training begins
        time.sleep(draw.uniform(0, 1.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before the last kill: make it longer"
        kills += 1
        rows = read_csv(logs / "metrics.csv")[1]
        reached = max((int(row["step"]) for row in rows if (row["step"] or "").isdigit()), default=0)
        whole = [path for path in checkpoint.newest_first(folder) if not checkpoint.damage(path)]
        assert len(whole) == len(list(folder.glob("*.ckpt")))  # none was torn
        lost.append(reached - max((checkpoint.peek(path).step for path in whole), default=0))
    print(f"{kills} kills, steps lost: {lost}")
    assert max(lost) <= 40  # steps of 1 ms: on a slow disk a save may take an interval, and the next one waits for it
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "auto")[0] == 0
    assert_runs_equal("whole", "parts")


def test_a_second_signal_stops_at_once_and_saves_nothing_torn(lm, workplace: Path) -> None:
    words = ["fit", "--config", "tiny.yaml", "--name", "parts", "--trainer.max_steps", 400]
    code, _, err = lm(*words, "--trainer.callbacks+", "tests.support.stop.StopTwice", "--trainer.callbacks.step=7")
    assert code == 143
    assert err.startswith("stopped by SIGTERM")
    assert checkpoint.peek(workplace / "checkpoints/parts/last.ckpt").step == 5  # the periodic one


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("delay", often([1.0, 0.0, 0.3, 2.5]))
def test_a_signal_before_training_starts(workplace: Path, delay: float, signum: int) -> None:
    process = start("fit", "--config", "tiny.yaml", "--trainer.max_steps", 100_000, cwd=workplace, fresh=True)
    while not listens(process.pid):  # a process that runs no code of ours yet dies of a signal
        time.sleep(0.01)
    time.sleep(delay)  # it is importing torch, or parsing
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (143 if signum == signal.SIGUSR1 else 128 + signum)
    assert err.startswith("stopped by SIG")
    assert "Traceback" not in out + err


def test_two_jobs_on_one_run_are_refused_and_a_dead_one_leaves_no_lock(lm, workplace: Path) -> None:
    words = ("fit", "--config", "tiny.yaml", "--trainer.max_steps", 10**6, "--ckpt_path", "auto")
    first = start(*words, cwd=workplace)
    try:
        while not (workplace / "checkpoints/tiny/last.ckpt").exists():
            assert first.poll() is None
            time.sleep(0.05)
        code, _, error = lm(*words)
        assert code == 2 and "checkpoints/tiny: another lm fit is at work in it" in error
        assert len(error.splitlines()) == 1
    finally:
        first.kill()
        first.communicate()
    assert lm(*words[:4], 1, *words[5:])[0] == 0


def test_a_second_job_leaves_alone_what_the_first_is_writing(lm, workplace: Path) -> None:
    run = workplace / "checkpoints/tiny"
    run.mkdir(parents=True)
    with storage.alone(run / ".lock", "busy"), checkpoint.replacing(run / "last.ckpt") as part:
        part.write(b"the first half")
        code, _, error = lm("fit", "--config", "tiny.yaml", "--ckpt_path", "auto")
        assert code == 2 and "another lm fit is at work in it" in error
        part.write(b" and the second")
    assert (run / "last.ckpt").read_bytes() == b"the first half and the second"


def test_a_lock_that_went_with_its_holder_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is removed between the opening and the locking of it: such a lock would keep nobody out."""
    lock, flock, gone = tmp_path / ".lock", fcntl.flock, []

    def slow(descriptor: int, how: int) -> None:
        if not gone:
            gone.append(lock)
            lock.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with storage.alone(lock, "busy"), pytest.raises(UserError, match="busy"), storage.alone(lock, "busy"):
        pass
    assert gone


def test_a_run_with_workers_ends_when_a_step_fails(workplace: Path) -> None:
    words = ("fit", "--config", "tiny.yaml", "--data.init_args.num_workers", 1, *stop_with("PoisonAt", 3))
    process = start(*words, cwd=workplace)
    _, error = process.communicate(timeout=60)  # the workers, who hold the pipe too, have ended
    assert process.returncode == 1 and "not finite" in error
