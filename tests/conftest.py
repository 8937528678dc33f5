"""What the tests share: a tiny recipe, the reference data where it is, and `lm` run in this process or in its own."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import yaml

from lm import cli
from lm.cli import main
from lm.errors import STOPS
from tests.support.processes import ROOT as ROOT
from tests.support.processes import share_server
from tests.support.processes import start as start

REFERENCE = Path(os.environ.get("LM_DATA_HOME") or "~/.cache/lm").expanduser().resolve()

RECIPE = {
    "seed_everything": 7,
    "trainer": {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1},
    "model": {
        "class_path": "lm.training.LanguageModel",
        "init_args": {
            "net": {
                "class_path": "lm.models.GPT",
                "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.2},
            },
            "schedule": {"class_path": "lm.training.schedules.Cosine", "init_args": {"warmup_steps": 3}},
        },
    },
    "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "text.txt", "block_size": 16, "batch_size": 4}},
    "checkpoint": {"every_n_steps": 5},
    "samples": {"max_new_tokens": 8},
}

MISSING = [n for n in ("tinyshakespeare.txt", "names.txt", "gpt2.tiktoken") if not (REFERENCE / n).is_file()]
"""What this machine lacks of the reference data."""

TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}; naïve? no: “exact”.\n" for i in range(300))


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of processes where pytest is about to start workers, which import meanwhile."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and what a test starts would inherit that
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        share_server()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch  # not above: of pytest's processes, that which only starts the workers needs none of it

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _frozen() -> None:
    gc.freeze()


@pytest.fixture(autouse=True)
def _quick_collector(monkeypatch: pytest.MonkeyPatch, _frozen: None) -> None:
    """Let no collection in this process walk through all that pytest has imported: half of what a short fit takes."""
    from lm.training.callbacks import process

    nothing = SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None)
    monkeypatch.setattr(process, "gc", nothing)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the reference data, as LM_DATA_HOME; skips where it is missing."""
    if MISSING:
        pytest.skip(f"LM_DATA_HOME lacks {', '.join(MISSING)}")
    monkeypatch.setenv("LM_DATA_HOME", str(REFERENCE))
    return REFERENCE


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a corpus text.txt, a recipe tiny.yaml and a data folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LM_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.fixture
def data_for(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[object]]:
    """Returns the options by which a recipe finds data: none, or stand-ins where the reference data is missing.

    A recipe that fine-tunes gets an imported network, too.
    """

    def options(recipe: dict[str, Any]) -> list[object]:
        if recipe["data"]["init_args"].get("tokenizer") == "inherit":
            from tests.support.exports import imported  # with torch, which the process that starts workers lacks

            return [*data_of(recipe), "--init_from", imported(workplace / "imported.ckpt")]
        return data_of(recipe)

    def data_of(recipe: dict[str, Any]) -> list[object]:
        data = recipe["data"]["init_args"]
        if not MISSING:
            monkeypatch.setenv("LM_DATA_HOME", str(REFERENCE))
        elif data.get("corpus") == "names":
            (workplace / "words.txt").write_text("\n".join(chr(97 + i % 26) * (1 + i % 7) for i in range(200)))
            return ["--data.init_args.corpus", "words.txt"]
        elif data.get("corpus") == "shakespeare":
            named = data.get("tokenizer", "inherit") != "inherit"
            tokenizer = ["--data.init_args.tokenizer", "byte"] if named else []
            return ["--data.init_args.corpus", "python-docs", *tokenizer]
        return []

    return options


@pytest.fixture
def lm(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `lm` in this process; returns its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        before = dict(os.environ)
        handlers = {signum: signal.getsignal(signum) for signum in STOPS}
        code = main([str(a) for a in arguments])
        for signum, handler in handlers.items():  # a pool's forked workers would have lm's, and survive its end
            signal.signal(signum, handler)
        out, err = capfd.readouterr()
        from torch import distributed

        if distributed.is_initialized():  # a process of its own would have ended
            distributed.destroy_process_group()
        for name in os.environ.keys() - before.keys():  # MASTER_PORT, say, which later processes would take over
            del os.environ[name]
        return code, out, err

    return run


class FoundError(Exception):
    pass


def parser_of(command: str) -> jsonargparse.ArgumentParser:
    """Return the parser that a command makes for itself."""
    with pytest.MonkeyPatch.context() as patch:

        def parse_args(self: jsonargparse.ArgumentParser, *_: Any, **__: Any) -> None:
            raise FoundError(self)

        patch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(cli.help, "PAGES", {})  # help that is written by hand
        with pytest.raises(FoundError) as found:
            cli.main([command, "--help"])
    return found.value.args[0]


@pytest.fixture
def our_rules() -> Iterator[None]:
    """Put the product's rules back after a test in which a user's own may have taken their place."""
    from lm.backprop import rules

    before = rules.registered()
    yield
    rules._rules.clear()
    rules._rules.update(before)
