"""Any value of any option of any command, several at once: an exit code that is promised, one line, nothing harmed.

Options come from each command's own parser, and from the classes of its recipe, so that a new one is tried unasked.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lm import data, models, training
from lm.training import schedules
from tests.conftest import ROOT, TEXT, parser_of

RECIPE = {
    "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
    "model": {
        "class_path": "lm.training.LanguageModel",
        "init_args": {
            "net": {"class_path": "lm.models.GPT", "init_args": {"n_layer": 1, "n_head": 1, "n_embd": 4}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "schedule": {"class_path": "lm.training.schedules.Cosine"},
        },
    },
    "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "text.txt", "block_size": 4, "batch_size": 2}},
    "samples": {"max_new_tokens": 2},
}
FIT = ("fit", "--config", "tiny.yaml", "--name", "new")
BASES = {
    "fit": FIT,
    "validate": ("validate", "--ckpt_path", "checkpoints/old/last.ckpt"),
    "test": ("test", "--ckpt_path", "checkpoints/old/last.ckpt"),
    "gradients": ("gradients", "--config", "tiny.yaml"),
    "plan": ("plan", "--config", "tiny.yaml"),
    "prepare": ("prepare", "--source", "text.txt", "--tokenizer", "char", "--output", "shards", "--workers", "1"),
    "tokenizer": ("tokenizer", "--source", "text.txt", "--vocab_size", "260", "--output", "made.tiktoken"),
    "sample": ("sample", "--ckpt_path", "checkpoints/old/last.ckpt", "--max_new_tokens", "2"),
    "export": ("export", "--ckpt_path", "checkpoints/old/last.ckpt", "--output", "exported"),
    "import": ("import", "--source", "safe", "--output", "made.ckpt"),
    "report": ("report", "old", "--output", "made.html"),
    "doctor": ("doctor",),
}
"""All commands but chat and serve, which wait for who talks to them, and sweep, which trains for minutes."""
PARTS = {
    "model.init_args": training.LanguageModel,
    "model.init_args.net.init_args": models.GPT,
    "model.init_args.optimizer.init_args": torch.optim.AdamW,
    "model.init_args.schedule.init_args": schedules.Cosine,
    "data.init_args": data.TextData,
}
WAITS = ("trainer.num_nodes", "trainer.devices", "model.init_args.compile")
"""Options by which a command rightly waits, for others or for a compiler: their good values are not tried."""
ALSO = {
    "ckpt_path": "checkpoint",
    "init_from": "checkpoint",
    "verify": "manifest",
    "accelerator": "gpu",
    "accumulate_grad_batches": "batch_size",
    "block_size": "context",
}
"""By which other word of the field a message may name an option."""

# devices are nodes of the folder's own: a fault of ours must not cost the machine its /dev/null
PATHS = (
    "missing",
    "canary",
    "canary/kept.txt",
    "/dev/null",
    "/dev/full",
    "dangling",
    "pipe",
    "locked",
    "a/b",
    "text.txt/x",
)
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "-0.5",
    "1e-320",
    "1e308",
    ".nan",
    ".inf",
    "-.inf",
    str(2**31),
    str(2**63),
    str(10**30),
)
WORDS = (
    "", " ", "null", "true", "~", "[]", "{}", "[1, 2]", "{a: 1}", "{a: 1, a: 2}", "a: b", "- a", "!!python/none",
    "&a [*a]", "%", "@", "*x", "auto", "os.system", "lm.models.GPT", "torch.nn.ReLU", "torch.optim.SGD", "naïve☃",
    "\udcff", "x" * 300, "x" * 5000, "9" * 5000, "[" * 900, "a\nb", "--json", "-", "last", "gpt2", "class_path: x",
)  # fmt: skip


def options_of(command: str) -> Iterator[str]:
    names = [action.dest for action in parser_of(command)._actions if action.option_strings]
    yield from (name for name in names if "help" not in name and name not in ("print_config", "print_shtab"))
    if any(name.startswith("trainer.") for name in names):
        for path, kind in PARTS.items():
            yield from (f"{path}.{name}" for name in inspect.signature(kind).parameters if name != "params")


@pytest.fixture(scope="module")
def options() -> list[tuple[str, str]]:
    return [(command, name) for command in BASES for name in options_of(command) if name not in WAITS]


class Fuzzer:
    """Runs `lm` on inputs, in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "LM_DATA_HOME": str(folder / "data"),
        }
        words = [sys.executable, str(Path(__file__).with_name("fuzz_child.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.child = subprocess.Popen(words, env=environment, cwd=folder, stderr=subprocess.DEVNULL, **pipes)
        self.template = folder / "template"
        self.template.mkdir()
        (self.template / "text.txt").write_text(TEXT[:2000])
        (self.template / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
        for words in (
            ("fit", "--config", "tiny.yaml", "--name", "old"),
            ("export", *BASES["export"][1:3], "--output", "safe"),
        ):
            assert self.run(list(words), self.template) == 0, (folder / "err").read_text()
        (self.template / "canary").mkdir()
        (self.template / "canary/kept.txt").write_text("a user's own")
        (self.template / "locked").write_text("nobody reads this")
        (self.template / "locked").chmod(0)

    def run(self, words: list[str], folder: Path) -> int | str:
        assert self.child.stdin and self.child.stdout
        print(json.dumps({"words": words, "folder": str(folder)}), file=self.child.stdin, flush=True)
        return json.loads(self.child.stdout.readline())

    def place(self) -> Path:
        self.number += 1
        place = self.folder / f"place{self.number % 2}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.template, place)
        (place / "dangling").symlink_to("nowhere")
        os.mkfifo(place / "pipe")
        for name, minor in (("null", 3), ("full", 7)):
            try:
                os.mknod(place / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            except PermissionError:  # not root: not tried
                (place / name).touch()
        return place

    def faults(self, command: str, chosen: list[tuple[str, str]], in_yaml: bool) -> Iterator[str]:
        """Try an input, and yield what is wrong with its outcome."""
        place = self.place()
        words = list(BASES[command])
        if in_yaml and "--config" in words:
            text = "".join(f"{name}: {value}\n" for name, value in chosen)
            (place / "more.yaml").write_text(text, errors="surrogateescape")
            words += ["--config", "more.yaml"]
        else:
            words += [f"--{name}={value}" for name, value in chosen]
        before = digests(place)
        code = self.run(words, place)
        err = (self.folder / "err").read_text(errors="replace")
        lines = err.splitlines()
        if code not in (0, 1, 2, 130, 141, 143):
            yield f"exit code {code}"
        if "Traceback" in err:
            yield "traceback"
        if code in (1, 2) and sum(line.startswith("error: ") for line in lines) != 1:
            yield f"{sum(line.startswith('error: ') for line in lines)} lines that begin with error"
        if code == 2 and not names_one(err, chosen):
            yield "the message names none of the options"
        if any(digest != digests(place).get(name) for name, digest in before.items()):
            yield "a user's file was changed"


def names_one(err: str, chosen: list[tuple[str, str]]) -> bool:
    """Return whether a message has a word of the name of one of the options, or of a key that its value has."""
    if "more.yaml" in err:  # the file that says them
        return True
    keys = {key for name, _ in chosen for key in name.split(".") if key != "init_args"}
    keys |= {key for _, value in chosen for key in re.findall(r"\w+", value)[:1]}
    return any(word in err for key in keys for word in (key, ALSO.get(key, key)))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    ours = [path for path in files if path.stat().st_mode & 0o400]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in ours if ".lock" not in path.name}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    made = Fuzzer(tmp_path_factory.mktemp("fuzz"))
    yield made
    assert made.child.stdin
    made.child.stdin.close()
    made.child.wait(timeout=60)


@st.composite
def inputs(draw: st.DrawFn, options: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]], bool]:
    """Draw a command, one to three of its options with a value each, and whether a YAML file says them."""
    command = draw(st.sampled_from(sorted({command for command, _ in options})))
    names = [name for owner, name in options if owner == command]
    value = st.one_of(st.sampled_from(PATHS), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8))
    value = value.filter(lambda text: "\0" not in text and text[:1] != "/" and text[:2] != "..")
    chosen = draw(
        st.lists(st.tuples(st.sampled_from(names), value), min_size=1, max_size=3, unique_by=lambda pair: pair[0])
    )
    return command, chosen, draw(st.integers(0, 3)) == 0


def fuzz(fuzzer: Fuzzer, options: list[tuple[str, str]], part: int, count: int) -> None:
    found: dict[str, str] = {}
    log = os.environ.get("LM_FUZZ_LOG", os.devnull)

    @seed(part)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(options))
    def try_one(case: tuple[str, list[tuple[str, str]], bool]) -> None:
        for fault in fuzzer.faults(*case):
            err = (fuzzer.folder / "err").read_text(errors="replace").strip().splitlines()[-1:]
            found.setdefault(f"{fault}: {str(err)[:160]}", ascii(case)[:300])
            with open(log, "a") as file:
                file.write(f"{fault} {err} {ascii(case)[:250]}\n")

    try_one()
    assert not found, "\n".join(f"{fault}\n    {case}" for fault, case in found.items())


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow if part < 2 else pytest.mark.long) for part in range(8)]
)
def test_two_thousand_inputs(part: int, fuzzer: Fuzzer, options: list[tuple[str, str]]) -> None:
    fuzz(fuzzer, options, part, int(os.environ.get("LM_FUZZ", "2000")) // 8)
