"""`trainer.precision auto`, `model.compile auto`: chosen once, said, kept; and nothing else of the run changes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lm.data import TextData
from lm.models import GPT
from lm.training import LanguageModel, ManualLanguageModel, auto
from tests.support.runs import assert_runs_equal

FIT = ("fit", "--config", "tiny.yaml", "--samples.max_new_tokens", 0)
AUTO = ("--trainer.precision", "auto")
CPU = torch.device("cpu")


@pytest.fixture
def mixed_takes(monkeypatch: pytest.MonkeyPatch):
    """Sets what is measured."""
    monkeypatch.setattr(auto, "has_instructions", lambda: True)
    return lambda ratio: monkeypatch.setattr(auto, "ratio_of_times", lambda *_: ratio)


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


def test_compiling_is_chosen_where_it_is_clearly_faster(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled here: what it would choose is measured elsewhere, and how it would train is said."""
    words = [*FIT, "--model.init_args.compile", "auto"]
    monkeypatch.setattr(auto, "compiler_missing", lambda device: None)
    monkeypatch.setattr(LanguageModel, "_use_compiler", lambda module: used.append(module))
    for ratio, chosen in ((0.95, False), (0.5, True)):
        used: list[LanguageModel] = []
        said = str(chosen).lower()
        monkeypatch.setattr(auto, "ratio_of_times", lambda *_, ratio=ratio: ratio)
        code, out, err = lm(*words, "--name", said)
        assert code == 0, err
        assert f"note: model.compile auto: {said}: compiled, a step takes {ratio:.2f} of the time" in out
        recipe = yaml.safe_load(Path(f"logs/{said}/config.yaml").read_text())
        assert recipe["model"]["init_args"]["compile"] is chosen and len(used) == chosen
    code, out, _ = lm(*words, "--name", "true", "--ckpt_path", "checkpoints/true/step=0000005.ckpt")
    assert code == 0 and "note: model.compile auto: true: as in the checkpoint" in out
    assert lm("plan", "--config", "tiny.yaml", "--model.init_args.compile", "auto")[0] == 0
    monkeypatch.setattr(auto, "ratio_of_times", lambda *_: torch.zeros(2) @ torch.zeros(3))
    code, out, err = lm(*words, "--name", "refused")
    assert code == 0 and "note: model.compile auto: false: it does not compile here (RuntimeError)" in out, err
    monkeypatch.setattr(auto, "compiler_missing", lambda device: "g++")
    code, out, _ = lm(*words, "--name", "without")
    assert code == 0 and "note: model.compile auto: false: g++ is missing here" in out
    code, _, err = lm(*words, "--trainer.devices", 2)
    assert (code, err) == (2, "error: model.compile auto is measured in one process: say true or false\n")


@pytest.fixture
def data(workplace: Path) -> TextData:
    made = TextData(corpus="text.txt", block_size=16, batch_size=4, seed=1)
    made.setup("fit")
    return made


def test_a_gain_must_be_clear_and_possible(data: TextData, mixed_takes, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(GPT, n_layer=1, n_head=1, n_embd=8)
    module = LanguageModel(net=small)
    mixed_takes(0.95)
    assert auto.choose_precision(module, data, CPU) == ("32-true", "bf16-mixed takes 0.95 of its time")
    mixed_takes(0.1)
    assert auto.choose_precision(module, data, CPU)[0] == "bf16-mixed"
    several = LanguageModel(net=small, steps_per_call=4)
    assert auto.choose_precision(several, data, CPU) == ("32-true", "model.steps_per_call is for full precision")
    monkeypatch.setattr(auto, "has_instructions", lambda: False)
    assert auto.choose_precision(module, data, CPU) == ("32-true", "this CPU has no instructions for 16-bit floats")


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LanguageModel, ManualLanguageModel])
def test_compiling_is_measured(data: TextData, kind: type[LanguageModel]) -> None:
    before = torch.get_rng_state()
    module = kind(net=partial(GPT, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
    chosen, reason = auto.choose_compile(module, data, CPU, "32-true")
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(chosen, bool) and "compiled, a step takes" in reason
    module.activation_checkpointing = kind is ManualLanguageModel
    assert not module.activation_checkpointing or auto.choose_compile(module, data, CPU, "32-true")[0] is False


@pytest.mark.parametrize("kind", [LanguageModel, ManualLanguageModel])
def test_it_is_measured(data: TextData, kind: type[LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's own gradients, in both precisions; the random state stays."""
    monkeypatch.setattr(auto, "SECONDS", 0.0)
    monkeypatch.setattr(auto, "has_instructions", lambda: True)
    seen = []

    def make(vocab_size: int, block_size: int) -> GPT:
        net = GPT(vocab_size, block_size, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
        net.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return net

    before = torch.get_rng_state()
    chosen, reason = auto.choose_precision(kind(net=make), data, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert chosen in ("32-true", "bf16-mixed") and " of " in reason
    if kind is LanguageModel:
        assert seen == [torch.float32, torch.bfloat16] * 2
