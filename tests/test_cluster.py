"""The launch recipes: run where that is possible, and held against the options that they use."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lm.checkpoints import checkpoint
from tests.conftest import ROOT
from tests.support.ranks import numbers, write_recipe
from tests.support.runs import assert_equal, state
from tests.support.steps import SCHEDULE

CLUSTER = ROOT / "cluster"


def launch(cwd: Path, name: str, *options: object, **environment: object) -> subprocess.Popen[str]:
    words = ["bash", str(CLUSTER / "torchrun.sh"), "--config", "tiny.yaml", "--name", name, *map(str, options)]
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": 1, **environment}
    both = {**os.environ, **{key: str(value) for key, value in settings.items()}}
    return subprocess.Popen(
        words, cwd=cwd, env=both, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_torchrun_trains_on_one_node_and_on_two_as_one_process_does(lm, workplace: Path) -> None:
    write_recipe(precision="64-true")
    text = (workplace / "tiny.yaml").read_text().replace("dropout: 0.2", "dropout: 0.0")
    (workplace / "tiny.yaml").write_text(text)
    assert lm("fit", "--config", "tiny.yaml", "--name", "alone")[0] == 0
    one = launch(workplace, "one-node", PROCESSES=2, MASTER_PORT=29611)
    out, _ = one.communicate(timeout=120)
    assert one.returncode == 0, out
    both = {"NNODES": 2, "PROCESSES": 1, "MASTER_PORT": 29612}
    nodes = [launch(workplace, "two-nodes", NODE_RANK=rank, **both) for rank in (0, 1)]
    outs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert numbers("one-node") == pytest.approx(numbers("alone"), rel=1e-10)
    assert numbers("two-nodes") == pytest.approx(numbers("alone"), rel=1e-10)


def rank_of(pid: str) -> str | None:
    """The rank that a process is, as torchrun has told it; None where it is none, or not there any more."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((one.decode().removeprefix("RANK=") for one in environment if one.startswith(b"RANK=")), None)


def the_rank(rank: str, name: str) -> int:
    found = [path.name for path in Path("/proc").glob("[0-9]*") if rank_of(path.name) == rank]
    return int(next(pid for pid in found if name in Path(f"/proc/{pid}/cmdline").read_text()))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.long), pytest.param("1", marks=pytest.mark.slow)])
def test_torchrun_starts_again_what_lost_a_rank(workplace: Path, rank: str) -> None:
    write_recipe(max_steps=600, val_check_interval=600, log_every_n_steps=200)
    words = ("--checkpoint.every_n_steps", 50, *SCHEDULE)
    name = f"lost-{rank}-{os.getpid()}"
    job = launch(workplace, name, *words, PROCESSES=2, MAX_RESTARTS=1, MASTER_PORT=29613)
    wait_for(Path(f"checkpoints/{name}/last.ckpt"), job)
    os.kill(the_rank(rank, name), signal.SIGKILL)
    out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    assert len(list(Path(f"logs/{name}").glob("config*.yaml"))) == 2
    whole = launch(workplace, "whole", *words, PROCESSES=2, MASTER_PORT=29613)
    out, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, out
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path(f"checkpoints/{name}/last.ckpt")))


@linux
@pytest.mark.slow
def test_the_scripts_exit_code_is_lms(workplace: Path) -> None:
    write_recipe(max_steps=100_000)
    bad = launch(workplace, "bad", "--data.init_args.corpus", "none", PROCESSES=2, MAX_RESTARTS=0, MASTER_PORT=29614)
    out, _ = bad.communicate(timeout=120)
    assert bad.returncode == 2 and "corpus none: no such file" in out, out
    job = launch(workplace, "stopped", "--checkpoint.every_n_steps", 50, PROCESSES=2, MASTER_PORT=29615)
    wait_for(Path("checkpoints/stopped/last.ckpt"), job)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 143, out
    step = checkpoint.peek(Path("checkpoints/stopped/last.ckpt")).step
    assert f"after step {step}; checkpoints/stopped/last.ckpt has step {step}" in out


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (0, False), (2, False)])
def test_slurm_requeues_what_was_stopped_and_nothing_else(workplace: Path, code: int, requeued: bool) -> None:
    """srun and scontrol are stand-ins: there is no SLURM here."""
    (workplace / "srun").write_text(f'#!/bin/sh\necho "$@" > srun.txt\nexit {code}\n')
    (workplace / "scontrol").write_text('#!/bin/sh\necho "$@" > scontrol.txt\n')
    for stand_in in ("srun", "scontrol"):
        (workplace / stand_in).chmod(0o755)
    given = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "77"}
    environment = {**os.environ, **given, "PATH": f"{workplace}:{os.environ['PATH']}"}
    words = ["bash", str(CLUSTER / "slurm.sbatch"), "--config", "tiny.yaml"]
    assert subprocess.run(words, cwd=workplace, env=environment).returncode == code
    said = (workplace / "srun.txt").read_text()
    assert "lm fit --config tiny.yaml --ckpt_path auto --trainer.num_nodes 2 --trainer.devices 8" in said
    assert (workplace / "scontrol.txt").exists() == requeued
    if requeued:
        assert (workplace / "scontrol.txt").read_text() == "requeue 77\n"


def test_kubernetes_runs_the_script_on_each_node() -> None:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    environment = {one["name"]: one for one in container["env"]}
    assert int(environment["NNODES"]["value"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    asked = set(re.findall(r"\$\{(\w+):-", (CLUSTER / "torchrun.sh").read_text()))
    assert environment.keys() <= asked
    assert (ROOT / container["command"][1]).is_file() and (ROOT / container["args"][1]).is_file()
    grace = int(re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (CLUSTER / "torchrun.sh").read_text())[1])
    assert grace < pod["terminationGracePeriodSeconds"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch", "sweep.sbatch"])
def test_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(CLUSTER / script)]).returncode == 0
