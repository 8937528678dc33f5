"""Ranks that die, stop, hang or drift end the run in time and by name."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.checkpoints import checkpoint
from lm.errors import CheckError
from lm.training.distributed import drift
from lm.training.distributed.drift import check_drift, weight_sum
from tests.conftest import start
from tests.support.cases import often
from tests.support.ranks import children, finish, run, write_recipe
from tests.support.runs import assert_equal, state
from tests.support.steps import SCHEDULE

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize(
    ("rank", "signum", "why"),
    often(
        [(1, "SIGKILL", "was killed by SIGKILL"), (1, "SIGSTOP", "no sign of life"), (0, "SIGKILL", "no sign of life")]
    ),
)
def test_a_lost_rank_ends_the_run_by_name_and_it_goes_on(workplace: Path, rank: int, signum: str, why: str) -> None:
    write_recipe(max_steps=3000, val_check_interval=1500, log_every_n_steps=500)
    words = ("--checkpoint.every_n_steps", 50, "--watch.timeout", 3, "--ckpt_path", "auto", *SCHEDULE)
    process = run("lost", 2, *words, cwd=workplace)
    while not Path("checkpoints/lost/last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    lost = [process.pid, *children(process.pid)][rank]
    began = time.monotonic()
    os.kill(lost, getattr(signal, signum))
    _, error = process.communicate(timeout=60)  # until the other has gone too
    took = time.monotonic() - began
    line = next(line for line in error.splitlines() if line.startswith("error: "))
    assert process.returncode == (1 if rank else -signal.SIGKILL)
    assert f"rank {rank} " in line.split(" ends: ")[-1] and why in line and f"process {lost}" in line
    assert took < 3 + 10  # --watch.timeout, and time for a busy machine
    step = checkpoint.peek(Path("checkpoints/lost/last.ckpt")).step
    finish(run("lost", 2, *words, "--trainer.max_steps", step + 10, cwd=workplace))
    finish(run("whole", 2, *words, "--trainer.max_steps", step + 10, cwd=workplace))
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/lost/last.ckpt")))


def callback(name: str, step: int) -> list[str]:
    return ["--trainer.callbacks+", f"tests.support.stop.{name}", f"--trainer.callbacks.step={step}"]


@pytest.mark.parametrize("where", often(["HangInForward", "Hang"]))
def test_a_rank_that_hangs_is_named(workplace: Path, where: str) -> None:
    write_recipe()
    process = run("hung", 2, *callback(where, 7), "--watch.step_timeout", 3, cwd=workplace)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "no rank has come any further for 3 s, rank 1 behind the others" in error
    assert "the newest checkpoint is whole: continue with --ckpt_path auto\n" in error
    assert all(f"rank {rank} hangs here:" in error for rank in (0, 1)) and "tests/support/stop.py" in error


def test_a_rank_that_drifts_is_named(workplace: Path) -> None:
    write_recipe()
    process = run("drifting", 2, *callback("Drift", 7), "--watch.drift_every_n_steps", 2, cwd=workplace)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "error: step 8: the weights of rank" in error and "h.0.ln_1.weight" in error
    assert "look for a broken device, and continue with --ckpt_path auto\n" in error
    assert checkpoint.peek(Path("checkpoints/drifting/last.ckpt")).step == 5  # nothing was saved since


def test_a_meeting_place_that_cannot_be_reached_is_named(
    lm, workplace: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    place = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 1}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port, "TORCHELASTIC_RUN_ID": "x"}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    code, _, err = lm("fit", "--config", "tiny.yaml", "--trainer.num_nodes", 2, "--watch.meet_timeout", 2)
    assert code == 2 and err.count("error: ") == 1
    assert f"error: rank 1: 127.0.0.1:{unused_port}" in err and "not reached in 2 s (Connection refused)" in err


def meet(place: dict[str, Any], cwd: Path) -> tuple[int, str]:
    """Be one of two nodes; return the exit code and what was said."""
    words = ("fit", "--config", "tiny.yaml", "--trainer.num_nodes", 2, "--watch.meet_timeout", 1)
    process = start(*words, cwd=cwd, environment={key: str(value) for key, value in place.items()})
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_a_first_process_that_stays_alone_says_so(workplace: Path, unused_port: int) -> None:
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port, "TORCHELASTIC_RUN_ID": "x"}
    code, error = meet(place, workplace)
    assert code == 2 and f"did not come to 127.0.0.1:{unused_port} in 1 s" in error


def test_a_first_process_that_does_not_answer_is_named(workplace: Path) -> None:
    with socket.socket() as silent:  # as one that was stopped: the kernel accepts, nobody answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        place = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 1}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
        code, error = meet(place, workplace)
    assert code == 2 and f"error: rank 1: rank 0 did not answer at 127.0.0.1:{port} in 1 s" in error


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}
SLURM |= {"SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (("--trainer.devices", 2), SLURM, "--ntasks-per-node=4"),
        (("--trainer.devices", 1), SLURM, "--ntasks-per-node=4"),
        ((), {name: SLURM[name] for name in SLURM if "PER_NODE" not in name}, "`--ntasks-per-node=4` instead"),
        (("--trainer.devices", 3), {}, "data.batch_size 4 is not divisible by 3 processes x 1 accumulated batches = 3"),
        (("--trainer.num_nodes", 2, "--trainer.devices", 4), SLURM, "--nodes=1"),
        (("--trainer.strategy", "fsdp"), {}, "use fsdp2"),
        (("--trainer.strategy", "ddp_spawn"), {}, "each rank is a program of its own here: use ddp"),
        (("--trainer.sync_batchnorm", "true"), {}, "trainer.sync_batchnorm"),
        (("--watch.timeout", 0), {}, "watch.timeout is 0"),
    ],
)
def test_bad_input_is_one_line(
    lm, workplace: Path, monkeypatch: pytest.MonkeyPatch, words: tuple, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = lm("fit", "--config", "tiny.yaml", *words)
    assert code == 2 and expected in err and len(err.splitlines()) == 1


def test_the_rank_that_differs_from_most_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net, step = torch.nn.Linear(3, 2), 10
    monkeypatch.setattr(drift, "_gather", lambda sums: [sums, sums, sums + torch.tensor([1, 0]), sums])
    with pytest.raises(CheckError, match=r"rank 2 differ from the other ranks', first at weight"):
        check_drift(net, step)
    monkeypatch.setattr(drift, "_gather", lambda sums: [sums, sums])
    check_drift(net, step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_checksum_changes_with_every_bit_and_with_the_order(dtype: torch.dtype) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    seen = {int(weight_sum(values)), int(weight_sum(values.flip(0)))}
    for bit in range(8 * dtype.itemsize):
        other = values.clone()
        other.view(kind)[2, 3] ^= torch.tensor(1, dtype=kind) << bit
        seen.add(int(weight_sum(other)))
    assert len(seen) == 2 + 8 * dtype.itemsize


@linux
@pytest.mark.parametrize("lost", often([0, 1], 0))
def test_a_rank_that_dies_before_the_ranks_have_met_ends_the_other(workplace: Path, lost: int) -> None:
    process = run("early", 2, cwd=workplace, fresh=True)
    while not (started := children(process.pid)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill([process.pid, *started][lost], signal.SIGKILL)
    _, error = process.communicate(timeout=60)  # until both have closed it
    if lost:
        assert process.returncode == 1 and "was killed by SIGKILL before the processes had met" in error
    else:
        assert process.returncode == -signal.SIGKILL and "error: rank 1: rank 0, which started it, is gone" in error


@pytest.mark.parametrize(("command", "signum"), [("fit", signal.SIGTERM), ("validate", signal.SIGINT)])
def test_a_wait_for_other_nodes_says_for_whom_and_ends_at_the_first_signal(
    lm, workplace: Path, unused_port: int, command: str, signum: int
) -> None:
    words: list[object] = [command, "--config", "tiny.yaml"]
    if command == "validate":
        assert lm("fit", "--config", "tiny.yaml", "--trainer.max_steps", 1)[0] == 0
        words = [command, "--ckpt_path", "checkpoints/tiny/last.ckpt"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    process = start(*words, "--trainer.num_nodes", 2, "--trainer.accelerator", "cpu", cwd=workplace, environment=place)
    assert process.stderr is not None
    said = next(line for line in process.stderr if line.startswith("note: "))
    assert said.startswith(f"note: waiting at 127.0.0.1:{unused_port} for 1 of 2 processes, rank 1, at most 600 s")
    assert f"MASTER_PORT={unused_port} and NODE_RANK=1" in said
    process.send_signal(signum)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + signum and error == f"stopped by {signal.Signals(signum).name}\n"


def test_two_ranks_print_an_evaluation_once(lm, workplace: Path) -> None:
    write_recipe()
    assert lm("fit", "--config", "tiny.yaml", "--trainer.max_steps", 1)[0] == 0
    alone = lm("validate", "--ckpt_path", "checkpoints/tiny/last.ckpt")[1]
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--split", "test")
    process = start("validate", "--ckpt_path", "checkpoints/tiny/last.ckpt", *two, cwd=workplace, ranks=2)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and len(out.splitlines()) == 1 == error.count("note: no test split"), (out, error)
    assert out.split(": ", 1)[1] == alone.split(": ", 1)[1]
