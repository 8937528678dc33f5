"""Launchers' variables that contradict each other, or that are no numbers."""

import re
from pathlib import Path

import pytest

from lm.cli import environment
from lm.errors import UserError
from tests.conftest import start


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK in the environment is 1, and there is no MASTER_PORT"),
        ({"RANK": "x"}, "RANK in the environment is 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is '0'"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK in the environment is 3, WORLD_SIZE 2"),
        (
            {"TORCHELASTIC_RUN_ID": "1"},
            "TORCHELASTIC_RUN_ID is in the environment, and there is no RANK or",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1"},
            "TORCH.* there is no LOCAL_RANK:",
        ),
        ({"SLURM_NTASKS": "-4"}, "SLURM_NTASKS in the environment is '-4'"),
    ],
)
def test_variables_of_launchers(lm, monkeypatch, variables: dict[str, str], expected: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = lm("fit", "--config", "tiny.yaml")
    assert code == 2 and re.match(f"error: {expected}", err) and err.count("\n") == 1, err


def test_a_rank_of_no_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK in the environment is 3, and there is no WORLD_SIZE"):
        environment.check()


@pytest.mark.parametrize("command", ["fit", "doctor"])
@pytest.mark.parametrize("variable", ["RANK=x", "RANK=", "SLURM_PROCID=x", "JSM_NAMESPACE_RANK=x"])
def test_what_is_no_number_is_refused_before_lightning_reads_it(command: str, variable: str, workplace: Path) -> None:
    name, _, value = variable.partition("=")
    process = start(command, cwd=workplace, fresh=True, environment={name: value})  # here Lightning is imported already
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, ""), err
    assert err == f"error: {name} in the environment is {value!r}: a launcher sets it to a number: unset it\n"
