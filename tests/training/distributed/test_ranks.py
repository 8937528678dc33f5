"""Several processes over gloo, started by plain `lm fit`: the same run however it is divided, stopped or resumed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import start
from tests.support.cases import often
from tests.support.ranks import MODULES, children, finish, numbers, run, stop_at, write_recipe
from tests.support.runs import assert_equal, state


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_division_changes_nothing(workplace: Path, module: str) -> None:
    write_recipe(precision="64-true", max_steps=100, val_check_interval=50)
    net = ("--model", f"lm.training.{module}", "--model.init_args.net.init_args.dropout", 0)
    for devices, accumulate in ((1, 1), (1, 4), (2, 2), (4, 1)):
        words = (*net, "--trainer.accumulate_grad_batches", accumulate)
        finish(run(f"{devices}x{accumulate}", devices, *words, cwd=workplace))
    whole = numbers("1x1")
    assert len(whole) >= 102
    for divided in ("1x4", "2x2", "4x1"):
        assert numbers(divided) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("module", often(MODULES))
def test_two_ranks_resume_to_the_last_bit_and_one_goes_on(workplace: Path, module: str) -> None:
    """Stopped twice, by signals to one rank or the other, in the middle of what is accumulated."""
    write_recipe(precision="64-true")
    words = ("--model", f"lm.training.{module}")
    both = (*words, "--trainer.accumulate_grad_batches", 2)
    finish(run("whole", 2, *both, cwd=workplace))
    for step, rank, signum in ((3, 1, signal.SIGUSR1), (7, 0, signal.SIGTERM)):
        process = run("parts", 2, *both, "--ckpt_path", "auto", *stop_at(step, rank, signum), cwd=workplace)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 143 and f"after step {step}; checkpoints/parts/last.ckpt has" in error, error
    finish(run("parts", 2, *both, "--ckpt_path", "last", cwd=workplace))
    whole = state(Path("checkpoints/whole/last.ckpt"))
    assert_equal(whole, state(Path("checkpoints/parts/last.ckpt")))
    first, second = (one["torch"] for one in whole["random_states"])
    assert not torch.equal(first, second)  # each rank drops out other units
    assert len(numbers("parts")) == len(numbers("whole"))
    middle = ("--ckpt_path", "checkpoints/whole/step=0000005.ckpt")
    finish(run("alone", 1, *words, *middle, "--model.init_args.net.init_args.dropout", 0, cwd=workplace))
    finish(run("both", 2, *words, *middle, "--model.init_args.net.init_args.dropout", 0, cwd=workplace))
    assert numbers("alone") == pytest.approx(numbers("both"), rel=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_at_one_step(workplace: Path, rank: int) -> None:
    write_recipe(max_steps=400, val_check_interval=200)
    finish(run("whole", 2, cwd=workplace))
    process = run("parts", 2, "--ckpt_path", "auto", cwd=workplace)
    while not Path("checkpoints/parts/last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill([process.pid, *children(process.pid)][rank], signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    finish(run("parts", 2, "--ckpt_path", "auto", cwd=workplace))
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))


@pytest.mark.parametrize("rank", often([1, 0]))
def test_a_signal_just_before_the_first_step_stops_after_it(workplace: Path, rank: int) -> None:
    write_recipe()
    process = run("early", 2, *stop_at(0, rank), cwd=workplace)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "after step 1; checkpoints/early/last.ckpt has step 1" in error, error


def test_a_signal_to_one_rank_in_an_evaluation_stops_both_and_it_is_made_up_for(workplace: Path) -> None:
    write_recipe()
    words = ("--data.init_args.val_fraction", 0.5)
    finish(run("whole", 2, *words, cwd=workplace))
    process = run("parts", 2, *words, *stop_at(8, 1, kind="StopInValidation"), cwd=workplace)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "after step 8" in error, error
    finish(run("parts", 2, *words, "--ckpt_path", "auto", cwd=workplace))
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
    assert numbers("whole") == numbers("parts")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(("rank", "signum"), often([(0, signal.SIGUSR1), (1, signal.SIGTERM)]))
def test_a_signal_to_one_rank_while_data_is_prepared_ends_both(workplace: Path, rank: int, signum: int) -> None:
    write_recipe()
    process = run("early", 2, "--data", "tests.support.stop.SlowData", cwd=workplace)
    while not Path("preparing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill([process.pid, *children(process.pid)][rank], signum)
    _, error = process.communicate(timeout=60)  # until the other has gone too
    # on a busy machine, a rank that waits for the other may see its connection end before it hears why
    assert process.returncode == 143 or (rank == 1 and "contact with another rank was lost" in error), error


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("module", MODULES)
def test_a_signal_to_one_rank_while_the_network_is_compiled_stops_both(workplace: Path, module: str) -> None:
    write_recipe()
    words = ("--config", "tiny.yaml", "--model", f"lm.training.{module}", "--model.init_args.compile", "true")
    cache = workplace / "compiled"
    command = ("fit", *words, "--trainer.devices", 2, "--name", "early", "--ckpt_path", "auto")
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    process = start(*command, cwd=workplace, ranks=2, environment=environment)
    while not any(cache.rglob("*.cpp")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert not Path("logs/early/metrics.csv").exists()  # no step has been finished
    os.kill(children(process.pid)[0], signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 143 and "after step 1; checkpoints/early/last.ckpt has step 1" in error, error
    finish(start(*command, cwd=workplace, ranks=2, environment=environment))
    assert state(Path("checkpoints/early/last.ckpt"))["global_step"] == 12


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity of threads is Linux's")
@pytest.mark.slow
def test_ranks_that_fill_the_machine_have_cores_of_their_own(workplace: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) % 2:
        pytest.skip("two ranks cannot share an odd number of cores evenly")
    half = len(cores) // 2
    write_recipe()
    words = ("fit", "--config", "tiny.yaml", "--trainer.devices", 2)
    say = ("--trainer.callbacks+", "tests.support.stop.SayCores")
    finish(start(*words, *say, cwd=workplace, fresh=True, environment={"OMP_NUM_THREADS": str(half)}))
    found = [json.loads(Path(f"cores-{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[cores[:half]], [cores[half:]]]


SLURM = {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "lm", "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_NNODES": 1}
SLURM |= {"SLURM_NODEID": 0, "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}


@pytest.mark.slow
def test_slurms_tasks_are_ranks_and_its_signal_saves_without_lightnings_requeue(lm, workplace: Path) -> None:
    """srun is played by this test: it starts two tasks with the variables of theirs. scontrol is a stand-in."""
    (workplace / "scontrol").write_text("#!/bin/sh\ntouch scontrol.txt\n")
    (workplace / "scontrol").chmod(0o755)
    write_recipe(precision="64-true")
    exact = ("--model.init_args.net.init_args.dropout", 0)

    def job(name: str, *words: object) -> list[tuple[int, str]]:
        tasks = []
        for task in (0, 1):
            given = {**SLURM, "SLURM_PROCID": task, "SLURM_LOCALID": task, "PATH": f"{workplace}:{os.environ['PATH']}"}
            command = ("fit", "--config", "tiny.yaml", "--name", name, "--trainer.devices", 2, *exact, *words)
            tasks.append(start(*command, cwd=workplace, environment={key: str(value) for key, value in given.items()}))
        return [(task.returncode, error) for task, (_, error) in [(t, t.communicate(timeout=120)) for t in tasks]]

    assert [code for code, _ in job("slurm")] == [0, 0]
    assert lm("fit", "--config", "tiny.yaml", "--name", "alone", *exact)[0] == 0
    assert numbers("slurm") == pytest.approx(numbers("alone"), rel=1e-10)
    stopped = job("stopped", *stop_at(7, 1, signal.SIGUSR1))
    assert [code for code, _ in stopped] == [143, 143], stopped
    assert not Path("scontrol.txt").exists() and not list(Path().rglob("hpc_ckpt*"))
    assert state(Path("checkpoints/stopped/last.ckpt"))["global_step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_stop_of_one_rank_in_the_last_evaluation_is_made_up_for(workplace: Path, strategy: str) -> None:
    write_recipe(max_steps=4, val_check_interval=100)
    words = ("--trainer.strategy", strategy, "--samples.max_new_tokens", 0)
    finish(run("whole", 2, *words, cwd=workplace))
    stop = {"class_path": "tests.support.stop.StopAtForward", "init_args": {"number": 5, "rank": 1, "signum": 1}}
    process = run("parts", 2, *words, "--trainer.callbacks+", json.dumps(stop), cwd=workplace)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 129 and "stopped by SIGHUP after step 4; checkpoints/parts/last.ckpt has" in error
    assert not Path("checkpoints/parts/best.ckpt").exists()
    finish(run("parts", 2, *words, "--ckpt_path", "auto", cwd=workplace))
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal(state(Path("checkpoints/whole") / name), state(Path("checkpoints/parts") / name))
    assert numbers("parts") == numbers("whole")
