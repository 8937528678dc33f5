"""Every network goes through fit, stop, resume, validate and sample."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lm.data import LinesData
from lm.data.module import IGNORED
from lm.generation import load_network
from tests.support.cases import often
from tests.support.networks import LINES, NETWORKS, REVERSE, SUMS, recipe
from tests.support.runs import assert_equal, state, stop_with, table


@pytest.mark.parametrize("name", often(NETWORKS, 3))
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
