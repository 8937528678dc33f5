"""The launch recipes: run where that is possible, and held against the options that they use."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.training.test_ranks import numbers, write_recipe

CLUSTER = ROOT / "cluster"


def launch(cwd: Path, name: str, **environment: object) -> subprocess.Popen[str]:
    import sys

    words = ["bash", str(CLUSTER / "torchrun.sh"), "--config", "tiny.yaml", "--name", name]
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": 1, **environment}
    both = {**os.environ, **{key: str(value) for key, value in settings.items()}}
    return subprocess.Popen(
        words, cwd=cwd, env=both, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )


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
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(CLUSTER / script)]).returncode == 0
