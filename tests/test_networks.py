"""Every network goes through fit, stop, resume, validate and sample."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from lm.data import LinesData
from lm.data.module import IGNORED
from lm.generation import load_network
from tests.support.cases import often
from tests.training.test_resume import assert_equal, state, stop_with, table

LINES = {"class_path": "lm.data.LinesData", "init_args": {"corpus": "words.txt", "block_size": 8, "batch_size": 8}}
WHOLE = {"class_path": "lm.data.LinesData", "init_args": {**LINES["init_args"], "targets": "all"}}
REVERSE = {
    "class_path": "lm.data.ReverseData",
    "init_args": {"alphabet": "abc", "longest_length": 4, "held_out": 10, "batch_size": 8},
}
SUMS = {"class_path": "lm.data.ArithmeticData", "init_args": {"digits": 1, "held_out": 10, "batch_size": 8}}
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16}
NETWORKS = {
    "MLP": ({"n_hidden": 16, "n_layer": 2}, LINES),
    "WaveNet": ({"n_hidden": 16}, LINES),
    "WaveNet per position": ({"n_hidden": 16, "norm_over_time": False}, LINES),
    "WaveNet dense": ({"n_hidden": 16, "depth": 2, "dense": True}, WHOLE),
    "GatedWaveNet": ({"n_embd": 8, "dropout": 0.1}, WHOLE),
    "GPT": ({**SMALL, "dropout": 0.1}, WHOLE),
    "GPT separate": ({**SMALL, "attention": "separate", "residual": False, "norm": "none"}, WHOLE),
    "GPT today": ({**SMALL, "positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "qk_norm": True}, SUMS),
    "GPT documents": ({**SMALL, "document_end": 0, "dropout": 0.1}, WHOLE),
    "Seq2Seq": ({**SMALL, "start_token": 1}, REVERSE),
}


def recipe(name: str, **more: object) -> None:
    arguments, data = NETWORKS[name]
    net = {"class_path": f"lm.models.{name.split()[0]}", "init_args": arguments}
    words = ["".join(chr(97 + (7 * i + j) % 26) for j in range(2 + i % 5)) for i in range(120)]
    Path("words.txt").write_text("\n".join(words))
    trainer = {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 1, "accelerator": "cpu"}
    model = {"class_path": "lm.training.LanguageModel", "init_args": {"net": net, **more}}
    text = {"trainer": trainer, "model": model, "data": data, "checkpoint": {"every_n_steps": 4}}
    Path("net.yaml").write_text(yaml.safe_dump(text))


@pytest.mark.parametrize("name", often(NETWORKS, 5))
def test_fit_stop_resume_validate_sample(lm, workplace: Path, name: str) -> None:
    recipe(name)
    words = ["fit", "--config", "net.yaml"]
    code, _, err = lm(*words, "--name", "whole")
    assert code == 0, err
    assert lm(*words, "--name", "parts", *stop_with("StopAt", 7))[0] == 143
    assert lm(*words, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
    assert table("whole") == table("parts")
    code, out, err = lm("validate", "--ckpt_path", "checkpoints/whole/last.ckpt", "--split", "test", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert ("exact_match" in result) == (NETWORKS[name][1] in (SUMS, REVERSE))
    assert 0 < result["loss"] < 4
    if "Lines" in NETWORKS[name][1]["class_path"]:
        data = LinesData(**NETWORKS[name][1]["init_args"])
        data.setup("fit")
        tokens, targets = data.examples["test"]
        logits = load_network(Path("checkpoints/whole/last.ckpt")).net(tokens).detach()
        kept = targets != IGNORED
        assert result["tokens"] == int(kept.sum())
        assert result["loss"] == pytest.approx(float(F.cross_entropy(logits[kept], targets[kept])), rel=1e-5)
    code, out, err = lm("sample", "--ckpt_path", "checkpoints/whole/last.ckpt", "--json", "--num_samples", 5)
    assert code == 0, err
    texts = json.loads(out.splitlines()[-1])["text"]
    assert len(texts) == 5 and not any("." in text for text in texts)  # the mark stops them and is not shown


@pytest.mark.parametrize("steps", [1, 4])
def test_calibration_follows_the_last_step_and_is_saved(lm, workplace: Path, steps: int) -> None:
    recipe("MLP", calibrate=True, steps_per_call=steps)
    assert lm("fit", "--config", "net.yaml")[0] == 0
    net = load_network(Path("checkpoints/net/last.ckpt")).net
    data = LinesData(**LINES["init_args"])
    data.setup("fit")
    made = net.hidden[0](net.wte(data.examples["train"][0]).flatten(1))
    torch.testing.assert_close(net.hidden[1].running_mean, made.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.hidden[1].running_var, made.var(0), rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in table("net") if row["val/loss"]] == ["4", "8", "12"]


def test_calibration_without_batch_norm_is_refused(lm, workplace: Path) -> None:
    recipe("GPT", calibrate=True)
    code, _, err = lm("fit", "--config", "net.yaml")
    assert code == 2 and "model.calibrate: GPT has no BatchNorm: set it to false" in err
