"""Launchers' variables that contradict each other, or that are no numbers."""

import pytest

from lm.cli import environment
from lm.errors import UserError


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK in the environment is 1, and there is no MASTER_PORT"),
        ({"RANK": "x"}, "RANK in the environment is 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is '0'"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK in the environment is 3, WORLD_SIZE 2"),
        ({"SLURM_NTASKS": "-4"}, "SLURM_NTASKS in the environment is '-4'"),
    ],
)
def test_variables_of_launchers(lm, monkeypatch, variables: dict[str, str], expected: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = lm("fit", "--config", "tiny.yaml")
    assert code == 2 and err.startswith(f"error: {expected}") and err.count("\n") == 1, err


def test_a_rank_of_no_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK in the environment is 3, and there is no WORLD_SIZE"):
        environment.check()
