"""Two machines as two network namespaces on this one, joined by a cable that can be cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm.checkpoints import checkpoint
from tests.conftest import ROOT
from tests.support.ranks import write_recipe
from tests.support.runs import assert_equal, state
from tests.support.steps import SCHEDULE

NETWORK = "10.231.77."


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Nodes:
    """Two namespaces, each with one end of a veth pair."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, [f"lm{os.getpid()}n{n}" for n in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "lmveth0", "netns", self.names[0], "type", "veth", "peer", "lmveth1", "netns", self.names[1])
        for n, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{NETWORK}{n + 1}/24", "dev", f"lmveth{n}")
            self.link(n, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def link(self, n: int, how: str) -> None:
        ip("-n", self.names[n], "link", "set", f"lmveth{n}", how)

    def fit(self, name: str, *words: object) -> list[subprocess.Popen[str]]:
        """Start torchrun on both."""
        settings = {"PYTHON": sys.executable, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "NNODES": 2, "PROCESSES": 1}
        settings |= {"MASTER_ADDR": f"{NETWORK}1", "MAX_RESTARTS": 0}
        command = ["bash", str(ROOT / "cluster/torchrun.sh"), "--config", "tiny.yaml", "--name", name, *map(str, words)]
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[n], *command], cwd=self.folder, text=True,
                env={**os.environ, **{k: str(v) for k, v in settings.items()},
                     "NODE_RANK": str(n), "GLOO_SOCKET_IFNAME": f"lmveth{n}"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )
            for n in (0, 1)
        ]  # fmt: skip

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def nodes(workplace: Path) -> Iterator[Nodes]:
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    try:
        both = Nodes(workplace)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    yield both
    both.remove()


@pytest.mark.slow
def test_a_cut_cable_ends_both_nodes_by_name_and_the_job_goes_on(nodes: Nodes, workplace: Path) -> None:
    write_recipe(max_steps=100_000, val_check_interval=50_000, log_every_n_steps=500)
    words = (*SCHEDULE, "--checkpoint.every_n_steps", 50, "--watch.timeout", 4)
    both = nodes.fit("cut", *words)
    last = Path("checkpoints/cut/last.ckpt")
    while not last.exists():
        assert all(node.poll() is None for node in both), [node.communicate()[0] for node in both]
        time.sleep(0.05)
    nodes.link(0, "down")
    outs = [node.communicate(timeout=60)[0] for node in both]
    assert all(node.returncode == 1 for node in both), outs
    assert "error: rank 0 ends: rank 1 of 2" in outs[0] and "lost its network" in outs[0], outs[0]
    assert "error: rank 1 ends: rank 0 of 2" in outs[1] and "lost its network" in outs[1], outs[1]

    nodes.link(0, "up")
    end = checkpoint.peek(last).step + 20
    for name in ("cut", "whole"):
        again = nodes.fit(name, *words, "--trainer.max_steps", end)
        outs = [node.communicate(timeout=120)[0] for node in again]
        assert all(node.returncode == 0 for node in again), outs
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(last))
