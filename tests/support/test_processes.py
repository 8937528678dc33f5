"""A fork of the server is to a test what a fresh interpreter is."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.processes import start


@pytest.mark.slow
@pytest.mark.parametrize("words", [("fit", "--config", "none.yaml")])
def test_a_fork_says_and_returns_what_an_interpreter_does(workplace: Path, words: tuple[str, ...]) -> None:
    found = []
    for fresh in (True, False):
        process = start(*words, cwd=workplace, fresh=fresh, environment={"LM_LOG": ""})
        found.append((*process.communicate(timeout=60), process.returncode))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_fork_has_its_own_folder_environment_group_and_end(workplace: Path) -> None:
    words = ("fit", "--config", "tiny.yaml", "--trainer.max_steps", 10**6)
    process = start(*words, cwd=workplace, start_new_session=True, environment={"LM_LOG": "json"})
    assert process.stdout is not None and process.stdout.readline().startswith("{")
    assert process.poll() is None and os.getpgid(process.pid) == process.pid
    assert os.readlink(f"/proc/{process.pid}/cwd") == str(workplace)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == process.poll() == -signal.SIGKILL
    assert not Path(f"/proc/{process.pid}").exists()
