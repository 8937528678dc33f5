"""A checkpoint that lacks a key, or has it of another type, is refused in a line, by every command that takes one."""

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.checkpoints import checkpoint, sharded

FIT = ("fit", "--config", "tiny.yaml", "--name", "on", "--trainer.max_steps", 3)
Keys = tuple[str | int, ...]


@pytest.fixture
def last(lm, workplace: Path) -> Path:
    assert lm("fit", "--config", "tiny.yaml", "--trainer.max_steps", 2)[0] == 0
    return Path("checkpoints/tiny/last.ckpt")


def keys(found: Any, place: Keys = (), depth: int = 9) -> Iterator[Keys]:
    """Yield every key of nested dicts and lists; of many tensors, the first two."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(found, dict):
        items = list(found.items())[: 2 if place[-1:] in (("state_dict",), ("state",)) else None]
    elif isinstance(found, list) and len(found) < 9:
        items = list(enumerate(found))
    for key, value in items:
        yield (*place, key)
        if depth > 1:
            yield from keys(value, (*place, key), depth - 1)


def harmed(saved: dict[str, Any], place: Keys, value: Any) -> dict[str, Any]:
    """Return a checkpoint without what is at a place, or with another value there."""
    changed = copy.deepcopy(saved)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return changed


def walk(lm, last: Path, words: tuple[object, ...], places: list[Keys]) -> set[Keys]:
    """Run a command on a checkpoint with each harm; return the places without which it was refused."""
    saved, refused = torch.load(last, weights_only=True), set()
    for place in places:
        for value in (None, "text", [1, "x"]):
            bad = Path("bad.ckpt")
            bad.unlink(missing_ok=True)
            checkpoint.write(harmed(saved, place, value), bad)
            code, _, err = lm(*words)
            assert code in (0, 2) and "Traceback" not in err, (place, value, err)
            if code:
                assert err.startswith("error: ") and len(err.splitlines()) == 1, (place, value, err)
                refused |= {place} if value is None else set()
    return refused


@pytest.mark.slow
def test_sample_and_export_of_a_checkpoint_with_any_harm(lm, last: Path) -> None:
    places = [
        place for place in keys(torch.load(last, weights_only=True)) if place[0] in ("global_step", "state_dict", "lm")
    ]
    needed: set[Keys] = {
        ("global_step",),
        ("state_dict",),
        ("lm",),
        ("lm", "config"),
        ("lm", "tokenizer"),
        ("lm", "vocab_size"),
    }
    words: tuple[object, ...] = ("sample", "--ckpt_path", "bad.ckpt", "--max_new_tokens", 2)
    assert needed <= walk(lm, last, words, [*sorted(needed), *places[::9]])
    for name in ("safetensors", "file"):
        words = ("export", "--ckpt_path", "bad.ckpt", "--format", name, "--output", "out", "--overwrite")
        assert needed <= walk(lm, last, words, sorted(needed))


NEEDED: list[Keys] = [("loops",), ("callbacks",), ("random_states",), ("optimizer_states",), ("epoch",)]
FEW: list[Keys] = [
    *NEEDED,
    ("callbacks", "Checkpoints", "best"),
    ("loops", "fit_loop", "epoch_loop.batch_progress", "total", "ready"),
    ("optimizer_states", 0, "param_groups", 0, "betas"),
]


def test_training_from_a_checkpoint_with_a_harm(lm, last: Path) -> None:
    assert set(NEEDED) <= walk(lm, last, (*FIT, "--ckpt_path", "bad.ckpt"), NEEDED)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "sample", "export"])
def test_any_command_with_any_harm(lm, last: Path, command: str) -> None:
    words = {
        "fit": FIT,
        "validate": ("validate",),
        "sample": ("sample", "--max_new_tokens", 2),
        "export": ("export", "--output", "out", "--overwrite"),
    }[command] + ("--ckpt_path", "bad.ckpt")
    every = 16 if command == "fit" else 8  # all of them take half an hour
    walk(lm, last, words, [*FEW, *list(keys(torch.load(last, weights_only=True)))[::every]])


def nan(last: Path) -> None:
    saved = torch.load(last, weights_only=True)
    saved["state_dict"]["net.wte.weight"][3, 5] = torch.nan
    checkpoint.write(saved, Path("nan.ckpt"))
    saved["state_dict"]["net.wte.weight"][:] = 3e38
    checkpoint.write(saved, Path("huge.ckpt"))


def test_weights_that_are_not_finite_are_said_with_exit_1(lm, last: Path) -> None:
    nan(last)
    for command in (("sample", "--max_new_tokens", 2), ("validate",), ("test",)):
        for path in ("nan.ckpt", "huge.ckpt"):
            code, out, err = lm(*command, "--ckpt_path", path)
            errors = [line for line in err.splitlines() if not line.startswith("note: no test split")]
            assert code == 1 and len(errors) == 1 and "not finite" in errors[0], (command, path, err)
            assert path in errors[0] or command[0] == "sample"
            assert "nan" not in out
    code, _, err = lm("export", "--ckpt_path", "nan.ckpt", "--output", "exported")
    assert code == 0 and err.startswith("note: nan.ckpt: wte.weight is not finite") and len(err.splitlines()) == 1
    code, _, err = lm("import", "--source", "exported", "--output", "back.ckpt")
    assert code == 0 and "is not finite" in err


@pytest.mark.parametrize("option", ["--ckpt_path", "--init_from"])
def test_training_does_not_go_on_from_weights_that_are_not_finite(lm, last: Path, option: str) -> None:
    nan(last)
    code, out, err = lm("fit", "--config", "tiny.yaml", "--name", "on", option, "nan.ckpt", "--trainer.max_steps", 20)
    assert code == 1 and "/20" not in out
    assert err.startswith("error: checkpoint nan.ckpt: wte.weight is not finite") and len(err.splitlines()) == 1
    assert not Path("checkpoints/on").exists()


def as_shards(last: Path) -> Path:
    """Write a checkpoint as a folder of one rank's share."""
    from torch.distributed import checkpoint as dcp

    folder, saved = Path("sharded.ckpt"), torch.load(last, weights_only=True)
    folder.mkdir()
    dcp.save({"state_dict": saved["state_dict"]}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    rest = {key: value for key, value in saved.items() if key not in ("state_dict", "optimizer_states")}
    checkpoint.write(rest | {"param_groups": []}, folder / "lm.pt")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    sums = {file.name: sharded.crc32(file) for file in folder.iterdir() if file.name != sharded.SUMS}
    (folder / sharded.SUMS).write_text(json.dumps(sums))


class Evil:
    def __reduce__(self) -> tuple:
        return open, ("ran", "w")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_whose_sums_are_right_and_whose_files_are_not(lm, last: Path) -> None:
    folder = as_shards(last)
    assert lm("sample", "--ckpt_path", folder, "--max_new_tokens", 2)[0] == 0
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    share = next(name for name in good if name.endswith(".distcp"))
    bad = {
        ".metadata": [pickle.dumps(Evil()), pickle.dumps({"state_dict_metadata": {}}), pickle.dumps(3), b"", b"text"],
        "lm.pt": [b"", b"text", pickle.dumps(Evil()), last.read_bytes()[:500]],
        share: [b"", b"text" * 999, good[share][:-900], bytes(len(good[share]))],
    }
    for name, contents in bad.items():
        for content in contents:
            (folder / name).write_bytes(content)
            seal(folder)
            for words in (("sample", "--max_new_tokens", 2), ("validate",), FIT, ("export", "--output", "out")):
                code, _, err = lm(*words, "--ckpt_path", folder)
                assert code == 2 and len(err.splitlines()) == 1, (name, content[:9], words, err)
            (folder / name).write_bytes(good[name])
    assert not Path("ran").exists() and not Path("out").exists() and not Path("checkpoints/on").exists()


@pytest.mark.slow
def test_an_export_with_any_harm_is_not_imported(lm, last: Path) -> None:
    assert lm("export", "--ckpt_path", last, "--output", "exported")[0] == 0
    rest, weights = Path("exported/lm.json"), Path("exported/model.safetensors")
    words = ("import", "--source", "exported", "--output", "back.ckpt", "--overwrite")
    values, data = json.loads(rest.read_text()), weights.read_bytes()
    for number, place in enumerate(keys(values)):
        value = (None, "text", [1, "x"])[number % 3]
        rest.write_text(json.dumps(harmed(values, place, value)))
        code, _, err = lm(*words)
        assert code in (0, 2) and (not code or len(err.splitlines()) == 1), (place, value, err)
    for text in ("", "[]", "3", "null", '"x"', "{}", "[" * 9999, "\0"):
        rest.write_text(text)
        code, _, err = lm(*words)
        assert code == 2 and len(err.splitlines()) == 1, (text[:9], err)
    rest.write_text(json.dumps(values))
    for content in (b"", b"x", b"\xff" * 64, (2**62).to_bytes(8, "little") + data[8:], data[:8] + b"{" * 99, data[:-8]):
        weights.write_bytes(content)
        code, _, err = lm(*words)
        assert code == 2 and len(err.splitlines()) == 1, (content[:9], err)
