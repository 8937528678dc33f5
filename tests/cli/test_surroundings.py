"""What surrounds a command: streams, launchers' variables, classes that are no such part, memory."""

import pytest

from lm.cli import environment
from lm.errors import UserError
from tests.conftest import start

NET = "--model.init_args.net"


@pytest.mark.parametrize("words", [("--help",), ("doctor",)])
def test_a_full_standard_output(tmp_path, words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = start(*words, cwd=tmp_path, stdout=full)
        err = process.communicate(timeout=120)[1]
    assert (process.returncode, err.count("\n")) == (2, 1), err
    assert err.startswith("error: standard output cannot be written to (No space left on device)")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_encoding(tmp_path, encoding: str) -> None:
    process = start("é☃", cwd=tmp_path, fresh=True, environment={"PYTHONIOENCODING": encoding}, text=False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and b"Traceback" not in out + err


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((NET, "torch.nn.ReLU"), "model.net: it cannot be made of vocab_size and block_size"),
        ((NET, "torch.nn.Linear"), "model.net Linear is no network for tokens"),
        (("--model.init_args.optimizer", "torch.optim.SparseAdam"), "model.optimizer SparseAdam: it is for sparse"),
        (("--model.init_args.optimizer", "torch.optim.LBFGS"), "model.optimizer"),
        (("--data", "lightning.pytorch.LightningDataModule"), "data LightningDataModule: it is not an lm.data"),
        ((f"{NET}.init_args.n_embd", 2 * 10**9), "memory does not suffice"),
    ],
)
def test_classes_and_sizes_that_cannot_be(lm, words: tuple, expected: str) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", *words)
    assert code == 2 and err.startswith(f"error: {expected}") and err.count("\n") == 1, err


def test_a_rank_of_no_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK in the environment is 3, and there is no WORLD_SIZE"):
        environment.check()
