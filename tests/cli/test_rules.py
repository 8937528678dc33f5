"""A user's own rules, in a file that the command line names."""

import json
from pathlib import Path

import pytest
from torch import nn

from lm.backprop import rules
from tests.support.networks import recipe

TANH = """
import torch
from torch import nn
from lm.backprop import rule

@rule(nn.Tanh)
def mine(layer, grads, x):
    y = torch.tanh(x)
    return y, lambda dy: dy * (1 - SLOPE)
"""


pytestmark = pytest.mark.usefixtures("our_rules")


def test_rules_are_compared_and_train(lm, workplace: Path) -> None:
    recipe("MLP")
    words = ["--config", "net.yaml", "--rules", "mine.py"]
    Path("mine.py").write_text(TANH.replace("SLOPE", "y"))
    code, out, err = lm("gradients", *words, "--json")
    assert code == 1 and "hidden.0.weight" in err
    assert json.loads(out.splitlines()[-1])["ok"] is False
    Path("mine.py").write_text(TANH.replace("SLOPE", "y * y"))
    assert lm("gradients", *words)[0] == 0
    code, out, err = lm("fit", *words, "--model", "lm.training.ManualLanguageModel")
    assert code == 0, err
    assert rules.registered()[nn.Tanh].__name__ == "mine"
    assert "rules" not in Path("logs/net/config.yaml").read_text()


@pytest.mark.parametrize("wrong", ["raise ValueError('mine')", "return torch.tanh(x)"])
def test_a_rule_that_fails_in_training_is_named(lm, workplace: Path, wrong: str) -> None:
    recipe("MLP")
    Path("mine.py").write_text(TANH.replace("y = torch.tanh(x)", wrong))
    words = ["--config", "net.yaml", "--rules", "mine.py", "--model", "lm.training.ManualLanguageModel"]
    code, _, err = lm("fit", *words)
    assert code == 2 and err.startswith("error: --rules mine.py: ValueError: ") and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(("text", "said"), [
    (None, "there is no such file"),
    ("def f(:\n", "line 1: invalid syntax"),
    ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ("x = 1\n", "it registers no rule"),
    ("exit(0)\n", "SystemExit: 0"),
])  # fmt: skip
def test_a_file_that_is_none(lm, workplace: Path, text: str | None, said: str) -> None:
    recipe("MLP")
    if text is not None:
        Path("mine.py").write_text(text)
    code, _, err = lm("gradients", "--config", "net.yaml", "--rules", "mine.py")
    assert code == 2 and err.startswith("error: --rules mine.py: ") and said in err and err.count("\n") == 1, err
