"""`trainer.precision auto`: chosen once, said, kept in the recipe, and nothing else of the run changes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lm.data import TextData
from lm.models import GPT
from lm.training import LanguageModel, ManualLanguageModel, precision
from tests.support.runs import assert_runs_equal

FIT = ("fit", "--config", "tiny.yaml", "--samples.max_new_tokens", 0)
AUTO = ("--trainer.precision", "auto")
CPU = torch.device("cpu")


@pytest.fixture
def mixed_takes(monkeypatch: pytest.MonkeyPatch):
    """Sets what is measured."""
    monkeypatch.setattr(precision, "has_instructions", lambda: True)
    return lambda ratio: monkeypatch.setattr(precision, "ratio_of_times", lambda *_: ratio)


def test_the_faster_one_trains_as_if_it_had_been_said_and_stays(lm, workplace: Path, mixed_takes) -> None:
    """A resumed run goes on in its precision, whatever would be measured now."""
    assert lm(*FIT, "--name", "said", "--trainer.precision", "bf16-mixed")[0] == 0
    mixed_takes(0.5)
    code, out, _ = lm(*FIT, "--name", "auto", *AUTO)
    assert code == 0 and "note: trainer.precision auto: bf16-mixed: a step takes 0.50 of the time of 32-true" in out
    assert yaml.safe_load(Path("logs/auto/config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    assert_runs_equal("said", "auto")
    mixed_takes(2.0)
    code, out, err = lm(*FIT, "--name", "auto", *AUTO, "--ckpt_path", "checkpoints/auto/step=0000005.ckpt")
    assert code == 0, err
    assert "note: trainer.precision auto: bf16-mixed: as in the checkpoint" in out and "differs" not in out
    assert_runs_equal("said", "auto")


@pytest.fixture
def data(workplace: Path) -> TextData:
    made = TextData(corpus="text.txt", block_size=16, batch_size=4, seed=1)
    made.setup("fit")
    return made


def test_a_gain_must_be_clear_and_possible(data: TextData, mixed_takes, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(GPT, n_layer=1, n_head=1, n_embd=8)
    module = LanguageModel(net=small)
    mixed_takes(0.95)
    assert precision.choose(module, data, CPU) == ("32-true", "bf16-mixed takes 0.95 of its time")
    mixed_takes(0.1)
    assert precision.choose(module, data, CPU)[0] == "bf16-mixed"
    several = LanguageModel(net=small, steps_per_call=4)
    assert precision.choose(several, data, CPU) == ("32-true", "model.steps_per_call is for full precision")
    monkeypatch.setattr(precision, "has_instructions", lambda: False)
    assert precision.choose(module, data, CPU) == ("32-true", "this CPU has no instructions for 16-bit floats")


def test_ranks_that_could_disagree_are_refused(lm, workplace: Path) -> None:
    code, _, err = lm(*FIT, *AUTO, "--trainer.devices", 2)
    assert code == 2 and err == (
        "error: trainer.precision auto is measured in one process: say 32-true or bf16-mixed\n"
    )


def test_other_commands_read_such_a_recipe(lm, workplace: Path) -> None:
    code, out, err = lm("plan", "--config", "tiny.yaml", "--json", *AUTO)
    assert code == 0 and json.loads(out)["parameters"] == 4048, err
    assert lm(*FIT)[0] == 0
    code, _, err = lm("validate", "--ckpt_path", "checkpoints/tiny/last.ckpt", *AUTO)
    assert (code, err) == (2, "error: trainer.precision auto: lm fit alone chooses: say 32-true or bf16-mixed\n")


@pytest.mark.parametrize("kind", [LanguageModel, ManualLanguageModel])
def test_it_is_measured(data: TextData, kind: type[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's own gradients, in both precisions; the random state stays."""
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    monkeypatch.setattr(precision, "has_instructions", lambda: True)
    seen = []

    def make(vocab_size: int, block_size: int) -> GPT:
        net = GPT(vocab_size, block_size, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
        net.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return net

    before = torch.get_rng_state()
    chosen, reason = precision.choose(kind(net=make), data, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert chosen in ("32-true", "bf16-mixed") and " of " in reason
    if kind is LanguageModel:
        assert seen == [torch.float32, torch.bfloat16] * 2
