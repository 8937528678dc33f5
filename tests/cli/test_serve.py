"""`lm serve`: its command line; what it serves is tested in tests/serving."""

from pathlib import Path

import pytest
import yaml

from lm.cli import serve, values
from lm.errors import UserError
from tests.conftest import ROOT


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["a/best.ckpt", "b/last.ckpt", "b/step=0000100.ckpt", "own=c/last.ckpt", "exports/imported.ckpt"]
    assert list(serve.names(words)) == ["a", "b/last", "b/step=0000100", "own", "imported"]
    assert serve.names(["a/best.ckpt", "c/x.ckpt"]) == {"a": Path("a/best.ckpt"), "x": Path("c/x.ckpt")}
    Path("step=5.ckpt").touch()
    assert list(serve.names(["step=5.ckpt"])) == [tmp_path.name]
    with pytest.raises(UserError, match="two checkpoints are called x"):
        serve.names(["a/x.ckpt", "b/x.ckpt"])


def test_checkpoints_are_said_together_or_one_by_one() -> None:
    for words in (
        ["--ckpt_path", "a", "b", "--port", "1"],
        ["--ckpt_path", "a", "--port", "1", "--ckpt_path", "b"],
        ["--ckpt_path=a", "--port=1", "--ckpt_path", "b"],
    ):
        options = values.parse(serve.make_parser(), serve.joined(words))
        assert options.ckpt_path == ["a", "b"] and options.port == 1


def test_what_compose_starts() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    command, *words = services["serve"]["command"]
    options = values.parse(serve.make_parser(), serve.joined(words))
    assert command == "serve" and options.host == "0.0.0.0" and options.api_key_file == Path("/run/secrets/keys")
    assert services["serve"]["read_only"] and services["serve"]["cap_drop"] == ["ALL"]
