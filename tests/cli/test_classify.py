"""`lm classify`: an encoder is trained on labelled texts, by autograd or by hand, and says the class of others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lm.checkpoints.restore import load_network
from lm.data import ClassData
from lm.data.classes import PAD
from tests.support.runs import assert_runs_equal, state, stop_with
from tests.support.served import written

Run = Callable[..., tuple[int, str, str]]


ENCODER = {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1}


def recipe(kind: str = "Encoder", settings: dict[str, object] = ENCODER, **data: object) -> None:
    """Write one: whether a text has more a than b."""
    net = {"class_path": f"lm.models.{kind}", "init_args": settings}
    texts = {"".join("ab"[(i >> k) & 1] for k in range(i % 3 + 5)) for i in range(2, 250)}
    rows = [("more a" if text.count("a") > text.count("b") else "fewer a", text) for text in sorted(texts)]
    Path("texts.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    text = {
        "trainer": {"max_steps": 60, "val_check_interval": 20, "accelerator": "cpu", "devices": 1},
        "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": net, "optimizer": optimizer}},
        "data": {
            "class_path": "lm.data.ClassData",
            "init_args": {"corpus": "texts.tsv", "block_size": 8, "batch_size": 32, **data},
        },
    }
    Path("classes.yaml").write_text(yaml.safe_dump(text))


def test_it_learns_and_says_the_class(lm: Run, workplace: Path) -> None:
    recipe()
    code, out, err = lm("fit", "--config", "classes.yaml")
    assert code == 0 and "accuracy" in out and "bits per byte" not in out, err
    path = Path("checkpoints/classes/last.ckpt")
    code, out, _ = lm("validate", "--ckpt_path", path, "--split", "test", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["accuracy"] > 0.9 and "bits_per_byte" not in result
    code, out, err = lm("classify", "--ckpt_path", path, "aaaaaab", "bbbab", "--json")
    assert code == 0 and [line.rsplit(maxsplit=1)[0] for line in err.splitlines()] == ["more a", "fewer a"]
    first, second = json.loads(out)["texts"]
    assert (first["class"], second["class"]) == ("more a", "fewer a")
    assert first["probability"] > 0.9 and sum(first["probabilities"].values()) == pytest.approx(1)
    net, tokenizer, *_ = load_network(path)
    logits = net(torch.tensor([[*tokenizer.encode("aaaaaab"), 0]]))[0].detach()  # what pads it changes nothing
    ids = [tokenizer.special_ids[name] for name in ("fewer a", "more a")]
    assert first["probabilities"]["more a"] == pytest.approx(float(logits[ids].softmax(0)[1]), rel=1e-5)
    shown = lm("inspect", "--config", "classes.yaml")[1]
    assert "→ 'more a')" in shown and "→ 'fewer a')" in shown
    for command in (("sample",), ("serve", "--port", 0), ("chat",), ("solve", "ab")):
        code, out, err = lm(*command, "--ckpt_path", path)
        said = f"error: checkpoint {path}: its network says a text's class: use lm classify\n"
        assert (code, out, err) == (2, "", said), command
    logged = [file.read_bytes() for file in Path("logs/classes").rglob("events.*")]
    assert logged and not any(b"sample" in one for one in logged), "no text is drawn"
    code, _, err = lm("bench", "--config", "classes.yaml", "--generate")
    assert (code, err) == (2, "error: --generate: data ClassData writes no text: leave it out\n")


def test_what_may_be_monitored(lm: Run, workplace: Path) -> None:
    recipe()
    words = ("fit", "--config", "classes.yaml", "--trainer.max_steps", 1, "--trainer.val_check_interval", 1)
    stop = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor")
    code, _, err = lm(*words, *stop, "val/bits_per_byte")
    assert code == 2 and "monitor is val/bits_per_byte: there are" in err and "val/accuracy, val/loss, val/per" in err
    code, _, err = lm(*words, *stop, "val/accuracy")
    assert code == 0, err


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("MLP", {"n_hidden": 20}), ("Encoder", {**ENCODER, "pad_token": None})],
    ids=["MLP", "Encoder"],
)
def test_it_reads_a_text_as_training_did(lm: Run, workplace: Path, kind: str, settings: dict[str, object]) -> None:
    """Also a network to which padding is a token like others, or that has it in front where a text is short."""
    recipe(kind, settings, block_size=12)
    code, _, err = lm("fit", "--config", "classes.yaml")
    assert code == 0, err
    path = Path("checkpoints/classes/last.ckpt")
    net, tokenizer, *_ = load_network(path)
    data = ClassData(corpus="texts.tsv", block_size=12)
    data.setup("validate")
    rows = [data.eval_dataset(split)[0] for split in ("val", "test")]
    tokens = torch.cat([one for one, _ in rows])
    texts = [tokenizer.decode(row).rstrip(PAD) for row in tokens.tolist()]
    names = {i: name for name, i in tokenizer.special_ids.items()}
    code, out, err = lm("classify", "--ckpt_path", path, *texts, "--json")
    found = json.loads(out)["texts"]
    logits = net(tokens).detach()
    assert [one["class"] for one in found] == [names[i] for i in logits.argmax(-1).tolist()]
    for one, row in zip(found, logits, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(row[[*names]].softmax(0).tolist(), rel=1e-4)


@pytest.mark.slow
def test_it_resumes(lm: Run, workplace: Path) -> None:
    recipe()
    words = ("fit", "--config", "classes.yaml")
    assert lm(*words, "--name", "whole")[0] == 0
    assert lm(*words, "--name", "parts", *stop_with("StopAt", 27))[0] == 143
    assert lm(*words, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")


@pytest.mark.slow
def test_by_hand_the_run_is_the_same(lm: Run, workplace: Path) -> None:
    recipe()
    words = ("fit", "--config", "classes.yaml", "--trainer.precision", "64-true", "--trainer.max_steps", 10)
    assert lm(*words, "--name", "autograd")[0] == 0
    code, _, err = lm(*words, "--name", "by-hand", "--model", "lm.training.ManualLanguageModel")
    assert code == 0, err
    states = [state(Path(f"checkpoints/{name}/last.ckpt")) for name in ("autograd", "by-hand")]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, rtol=1e-8, atol=1e-10)
    code, out, err = lm("gradients", "--config", "classes.yaml")
    assert code == 0 and "gradients by hand agree with" in out, err


BAD = {
    "no tab": ("good one\n", "corpus bad.tsv, line 2: it has 0 tabs: expected label, a tab, text"),
    "two tabs": ("good\tone\ttwo\n", "corpus bad.tsv, line 2: it has 2 tabs: expected label, a tab, text"),
    "no label": ("\tone\n", "corpus bad.tsv, line 2: its label is empty: expected label, a tab, text"),
    "no text": ("good\t \n", "corpus bad.tsv, line 2: its text is empty"),
    "one label": ("good\tmore\n", "corpus bad.tsv: all lines have the label 'good': expected two or more"),
    "a mark": ("bad\tmo\x03re\n", "corpus bad.tsv, line 2: it has the control character 3, which pads texts"),
    "too long": ("bad\tmuch more than that\n", "are longer than data.block_size 8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines(lm: Run, workplace: Path, name: str) -> None:
    recipe(corpus="bad.tsv")
    lines, message = BAD[name]
    long = "".join(f"good\tmuch longer {i}\n" for i in range(20)) if name == "too long" else ""
    Path("bad.tsv").write_text(f"good\tsome\n{lines}{long}")
    code, _, err = lm("fit", "--config", "classes.yaml")
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_what_cannot_be_classified(lm: Run, workplace: Path) -> None:
    recipe()
    assert lm("fit", "--config", "classes.yaml", "--trainer.max_steps", 1)[0] == 0
    path = "checkpoints/classes/last.ckpt"
    for text, message in {
        "": "has 0 characters: it takes 1 to 8",
        "a" * 9: "has 9 characters",
        "abc": "lacks 'c'",
        "a\x03b": "has the control character 3, which pads texts here",
    }.items():
        code, out, err = lm("classify", "--ckpt_path", path, "ab", text)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    written(workplace / "text.ckpt")
    code, _, err = lm("classify", "--ckpt_path", "text.ckpt", "ab")
    assert code == 2 and err.endswith("text.ckpt: its network writes text: lm sample continues it\n")
    Path("texts.tsv").write_text("new\tab\nmore a\tbb\n" + "".join(f"new\t{'a' * (i % 5 + 1)}b\n" for i in range(20)))
    code, _, err = lm("validate", "--ckpt_path", path)
    assert code == 2 and "its label 'new' is none of the checkpoint's classes fewer a, more a" in err
