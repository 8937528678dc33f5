"""Errors below the front door name settings as a program knows them; `lm` writes the same ones as options."""

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lm import log, outputs
from lm.checkpoints import runs, safetensors
from lm.corpus import formats
from lm.corpus.prepare import Preparation, prepare
from lm.corpus.tokenizer_training import train
from lm.errors import CommandError, UserError, setting
from lm.generation.sampling import Sampler, start_tokens
from lm.tokenizers import CharTokenizer
from lm.training.distributed import drift
from lm.training.guard import Guard

Run = Callable[..., tuple[int, str, str]]
CORPUS = ("prepare", "--source", "text.txt", "--tokenizer", "char", "--workers", 1)


def drifted() -> None:
    with patch.object(drift, "_gather", lambda sums: [sums, sums, sums + 1]):
        drift.check_drift(torch.nn.Linear(1, 1), 8)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a file": (
        lambda: prepare(Preparation(["text.txt"], "char", Path("text.txt"))),
        "`output` text.txt: it is a file: say an empty or a new folder",
    ),
    "not free": (
        lambda: outputs.check_free(Path("text.txt"), made="text", ours=lambda path: True, overwrite=False),
        "`output` text.txt: it is there already: say another name, or `overwrite`",
    ),
    "shares": (
        lambda: Preparation(["text.txt"], "char", Path("out"), val_fraction=0.5, test_fraction=0.5),
        "`val_fraction` 0.5, `test_fraction` 0.5: leave nothing to train on",
    ),
    "a bound": (lambda: Sampler(temperature=-1), "temperature is -1: it must be at least 0"),
    "a table": (
        lambda: train(["text.txt"], 300, Path("a.txt"), formats.Settings()),
        "`output` a.txt: say a name that ends in .tiktoken",
    ),
    "no run": (
        lambda: runs.resolve(Path("none"), [], "last", print),
        "`ckpt_path` last: none has no checkpoint: leave it out to start, or say auto",
    ),
    "no export": (
        lambda: safetensors.import_safetensors(Path("none"), Path("a.ckpt")),
        "`source` none: there is no such file or folder",
    ),
    "a prompt": (lambda: start_tokens(CharTokenizer("ab"), "`prompt`"), "the vocabulary of 2 characters lacks '`'"),
    "drift": (drifted, "look for a broken device, and continue with `ckpt_path` auto"),
    "not finite": (
        lambda: Guard().verdict(3, math.nan, 1.0, scaled=False),
        "nothing was updated; continue with `ckpt_path` last and a lower learning rate",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_of_the_library_names_values(case: str, workplace: Path) -> None:
    call, expected = CALLS[case]
    with pytest.raises(CommandError) as found:
        call()
    assert expected in str(found.value) and not re.search(r"--\w|\0", str(found.value))


def test_a_command_names_options(lm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Path("checkpoints/tiny/last.ckpt")
    busy.parent.mkdir(parents=True)
    busy.write_bytes(b"damaged")
    bad = Path("bad.jsonl")
    bad.write_text("[]\n")
    advice = ": say another --text_key, or --errors skip to leave such rows out\n"
    for words, expected in (
        ((*CORPUS, "--output", "text.txt"), "error: --output text.txt: it is a file: say an empty or a new folder\n"),
        ((*CORPUS, "--output", "out", "--source", bad), advice),
        ((*CORPUS, "--output", "out", "--val_fraction", 2), "error: --val_fraction is 2: it must be at least 0 and "),
        (("sample", "--ckpt_path", "a.ckpt", "--temperature", -1), "error: --temperature is -1: it must be at least 0"),
        (("fit", "--config", "tiny.yaml"), "say --ckpt_path last to continue the run, or --name for a new one\n"),
        (("fit", "--config", "tiny.yaml", "--data.init_args.batch_size", 0), "error: data.batch_size is 0: "),
    ):
        code, _, err = lm(*words)
        assert code == 2 and expected in err and not re.search("[`\0]", err), err
    monkeypatch.setenv("LM_LOG", "json")
    code, _, err = lm(*CORPUS, "--output", "text.txt")
    assert json.loads(err)["message"] == "--output text.txt: it is a file: say an empty or a new folder"


def test_what_a_user_wrote_stays_as_it_is(lm: Run) -> None:
    for name in ("`output`", "`{}`", "{output}", r"\\1", "`errors`.jsonl"):
        Path(name).write_text("[]\n")
        code, _, err = lm(*CORPUS, "--output", name)
        assert code == 2 and err == f"error: --output {name}: it is a file: say an empty or a new folder\n"
    code, _, err = lm(*CORPUS, "--output", "out", "--source", "`errors`.jsonl")
    assert code == 2 and err.startswith("error: `errors`.jsonl, line 1: ") and "or --errors skip" in err


def test_a_line_names_options_while_a_command_runs() -> None:
    """Whoever prints it: a thread, or a process that the command has started."""
    text = f"`rank` 1 ends: continue with {setting('ckpt_path')} auto"
    assert log.line(text) == "`rank` 1 ends: continue with `ckpt_path` auto"
    with log.naming_options():
        assert log.line(text, level="error") == "error: `rank` 1 ends: continue with --ckpt_path auto"
    assert log.line(text) == "`rank` 1 ends: continue with `ckpt_path` auto"


def test_an_error_keeps_its_settings_on_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(UserError(f"{setting('output')} a: it is a file")))
    assert (str(error), error.text) == ("`output` a: it is a file", "\0output\0 a: it is a file")
