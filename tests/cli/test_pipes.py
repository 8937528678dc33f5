"""A pipe to which nobody writes, where a file is expected: who opens it waits for ever."""

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lm.checkpoints import checkpoint, sharded
from lm.errors import UserError
from tests.conftest import RECIPE

COMMANDS = {
    "fit --config pipe": "--config pipe: a pipe or a device",
    "fit --config tiny.yaml --config pipe": "--config pipe: a pipe or a device",
    "fit --config tiny.yaml --trainer pipe": "--trainer pipe: a pipe or a device",
    "fit --config tiny.yaml --model.init_args.net=pipe": "--model.init_args.net pipe: a pipe or a device",
    "fit --config tiny.yaml --ckpt_path pipe": "--ckpt_path pipe: a pipe or a device",
    "fit --config tiny.yaml --init_from pipe.ckpt": "--init_from pipe.ckpt: a pipe or a device",
    "fit --config tiny.yaml --data.init_args.corpus shards": "shards",
    "fit --config tiny.yaml --data.init_args.corpus pipe": "pipe",
    "fit --config inside.yaml": "inside.yaml: pipe: a pipe",
    "plan --config /dev/zero": "--config /dev/zero: a pipe or a device",
    "validate --ckpt_path pipe": "checkpoint pipe: it is",
    "sample --ckpt_path pipe": "--ckpt_path pipe: a pipe or a device",
    "prepare --config pipe": "--config pipe: a pipe or a device",
    "prepare --source text.txt --tokenizer byte --output shards": "a pipe or a device",
    "export --ckpt_path pipe.ckpt --output new": "--ckpt_path pipe.ckpt: a pipe or a device",
    "import --source folder --output new.ckpt": "a pipe or a device",
    "doctor --lock pipe": "--lock pipe: a pipe or a device",
}


@pytest.fixture(autouse=True)
def _no_wait() -> Iterator[None]:
    """Turn a wait without end into a failure."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_pipe_is_refused(words: str, lm: Callable, workplace: Path) -> None:
    for name in ("pipe", "pipe.ckpt", "folder/lm.json", "shards/manifest.json"):
        Path(name).parent.mkdir(exist_ok=True)
        os.mkfifo(name)
    Path("inside.yaml").write_text(yaml.safe_dump(RECIPE | {"trainer": {"max_steps": 1, "callbacks": ["pipe"]}}))
    code, _, err = lm(*shlex.split(words))
    assert code == 2 and len(err.splitlines()) == 1 and COMMANDS[words] in err


def test_what_the_shell_has_opened_is_read(lm: Callable, workplace: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"1 times")
    os.close(write)
    assert lm("fit", "--config", "tiny.yaml", "--trainer.max_steps", 1)[0] == 0
    prompted = ("sample", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--max_new_tokens", 1)
    code, out, err = lm(*prompted, "--prompt_file", f"/dev/fd/{read}")
    os.close(read)
    assert code == 0 and out.startswith("1 times")
    os.mkfifo("pipe")
    code, _, err = lm(*prompted, "--prompt_file", "pipe")
    assert code == 2 and err.startswith("error: --prompt_file pipe: a pipe or a device")


def test_pipes_among_checkpoints_are_passed_over(workplace: Path) -> None:
    os.mkfifo("last.ckpt")
    assert checkpoint.newest_first(workplace) == {}
    Path("sharded").mkdir()
    os.mkfifo("sharded/checksums.json")
    assert "a pipe or a device" in (sharded.damage(Path("sharded")) or "")
    with pytest.raises(UserError, match="no such file"):
        checkpoint.verify(Path("other.ckpt"))
