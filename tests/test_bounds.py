"""Every number of every setting has a bound, and what is outside is refused: by constructors and by the front door."""

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lm import bounds, cli, data, models, posttraining, training
from lm.corpus.prepare import Preparation
from lm.generation.sampling import Sampler
from lm.training import optimizers, schedules
from lm.training.callbacks.checkpointing import Checkpoints
from lm.training.callbacks.figures import Figures
from lm.training.callbacks.samples import SampleText
from lm.training.distributed.watch import Watch
from lm.training.language_model import LanguageModel
from tests.conftest import parser_of

INT64 = 2**63 - 1
NET = {"vocab_size": 5, "block_size": 8}
NEEDED: dict[type, dict[str, Any]] = {
    **{getattr(models, name): NET for name in models.__all__},
    models.Seq2Seq: {**NET, "start_token": 0},
    **{getattr(data, name): {} for name in data.__all__},
    **{kind: {} for kind in schedules.Schedule.__subclasses__()},
    schedules.Step: {"milestones": [3]},
    **{getattr(place, name): {"net": models.Bigram} for place in (training, posttraining) for name in place.__all__},
    **{kind: {} for kind in (Checkpoints, SampleText, Sampler, Figures, Watch)},
    Preparation: {"source": [], "tokenizer": "char", "output": Path("x")},
    optimizers.MuonAdamW: {"params": []},
    optimizers.ScaledAdamW: {"params": []},
}
"""Classes that recipes and commands name, and what each cannot be made without."""


def numbers(kind: Any) -> Iterator[tuple[str, str]]:
    """Yield each numeric setting of a class or function, and its type."""
    for name, parameter in inspect.signature(kind).parameters.items():
        text = parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation)
        if re.search(r"\b(int|float)\b", re.sub(r"Literal\[[^]]*\]|Callable\[.*|<class 'bool'>", "", text)):
            yield name, text


def wrong(bound: bounds.Bound, text: str) -> list[Any]:
    """Return values that a bound leaves out."""
    values: list[Any] = [] if bound.flag else [True]
    values += [math.nan, math.inf, -math.inf]
    if math.isfinite(bound.low):
        values += [bound.low if bound.open_low else bound.low - 1, -(10**30)]
    if math.isfinite(bound.high):
        values += [bound.high if bound.open_high else bound.high * 2 + 1, 10**5000]
    if bound.whole:
        values.append(bound.low + 0.5)
    if bound.share:
        values.append(1.5)
    if "dict" in text:
        return [{"a": value, "b": 1} for value in values]
    if "list[" in text or "tuple" in text:
        return [[0.5, value] for value in values]
    return values


def owner_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


SETTINGS = [(kind, name, text) for kind in NEEDED for name, text in numbers(kind)]


@pytest.mark.parametrize(("kind", "name", "text"), SETTINGS, ids=[f"{k.__name__}.{n}" for k, n, _ in SETTINGS])
def test_a_class_refuses_what_is_out_of_bounds(kind: type, name: str, text: str) -> None:
    bound = bounds.bound(owner_of(kind), name)
    assert bound is not None, f"lm/bounds.py has no bound for {kind.__name__}.{name}"
    for value in wrong(bound, text):
        with pytest.raises((ValueError, cli.UserError), match=rf"^\S*\b{name} is "):
            kind(**{**NEEDED[kind], name: value})


def test_defaults_are_within() -> None:
    for kind, needed in NEEDED.items():
        parameters = inspect.signature(kind).parameters
        defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
        assert not list(bounds.complaints({**defaults, **needed}, owner_of(kind))), kind
    defaults = {name: each.default for name, each in inspect.signature(Trainer).parameters.items()}
    assert not list(bounds.complaints({"trainer": defaults}))


@pytest.mark.parametrize(("name", "text"), [*numbers(Trainer)])
def test_the_front_door_refuses_for_the_trainer(name: str, text: str) -> None:
    if name in ("precision", "plugins"):  # choices, and objects
        return
    bound = bounds.bound("Trainer", name)
    assert bound is not None, f"lm/bounds.py has no bound for Trainer.{name}"
    for value in wrong(bound, "" if name != "max_time" else "dict"):
        (complaint,) = bounds.complaints({"trainer": {name: value}})
        assert re.fullmatch(rf"trainer\.{name} is .*: it must be .*", complaint)


def test_optimizers_of_torch_take_finite_numbers_only() -> None:
    kinds = [kind for kind in vars(torch.optim).values() if inspect.isclass(kind) and kind is not torch.optim.Optimizer]
    names = {(kind, name) for kind in kinds for name in inspect.signature(kind).parameters if name != "params"}
    assert len(names) > 50
    for kind, name in names:
        for value in (math.nan, math.inf):
            node = {"class_path": f"torch.optim.{kind.__name__}", "init_args": {name: value}}
            (complaint,) = bounds.complaints({"model": {"optimizer": node}})
            assert complaint.startswith(f"model.optimizer.{name} is ")


def test_others_know_their_own_bounds() -> None:
    node = {"class_path": "mine.Network", "init_args": {"dropout": 1, "depth": 0, "seed": 10**30}}
    assert not list(bounds.complaints({"model": {"net": node}}))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_number_of_a_command_has_a_bound(command: str) -> None:
    parser = parser_of(command)
    for action in parser._actions:
        kind = getattr(action, "type", None) or getattr(action, "_typehint", None)
        text = re.sub(r"Literal\[[^]]*\]", "", str(getattr(action, "_typehint", kind)))
        section, _, name = action.dest.rpartition(".")
        if re.search(r"\b(int|float)\b", text) and name not in ("precision", "plugins"):
            owner = bounds.SECTIONS.get(section, parser.prog.split()[-1] if parser.prog.startswith("lm ") else "")
            assert bounds.bound(owner, name) is not None, f"lm/bounds.py has no bound for {command} --{action.dest}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "samples.seed",
            10**22,
            f"samples.seed is {10**22}: it must be at least {-(2**63)} and at most {INT64}",
        ),
        (
            "checkpoint.keep_last",
            2**63,
            f"checkpoint.keep_last is {2**63}: it must be at least 1 and at most {INT64}",
        ),
        ("model.clip_norm", ".inf", "model.clip_norm is inf: it must be at least 0 and finite; 0 or null never scales"),
        ("data.seed", 10**20, f"data.seed is {10**20}: data follow seed_everything: say that alone"),
        ("data.init_args.seed", 8, "data.init_args.seed is 8: data follow seed_everything: say that alone"),
        ("data.batch_size", 0, "data.batch_size is 0: it must be at least 1"),
        ("model.clip_norm", -1, "model.clip_norm is -1: it must be at least 0; 0 or null never scales"),
        ("model.spike", 0.5, "model.spike is 0.5: it must be above 1; null for none"),
        ("model.net.dropout", 1.5, "model.net.dropout is 1.5: it must be at least 0 and below 1"),
        ("model.schedule.min_factor", -1, "model.schedule.min_factor is -1: it must be at least 0 and at most 1"),
        ("trainer.gradient_clip_val", -1, "trainer.gradient_clip_val is -1: it must be at least 0"),
        ("trainer.log_every_n_steps", -1, "trainer.log_every_n_steps is -1: it must be at least 0"),
        ("trainer.limit_val_batches", ".nan", "trainer.limit_val_batches is nan: it must be at least 0"),
        ("trainer.check_val_every_n_epoch", 2, "trainer.check_val_every_n_epoch is 2: training has no epochs"),
        ("trainer.min_epochs", 2, "trainer.min_epochs is 2: training has no epochs"),
        ("trainer.min_steps", 99, "trainer.min_steps 99 is above trainer.max_steps 12"),
        ("samples.max_new_tokens", -1, "samples.max_new_tokens is -1: it must be at least 0"),
        ("seed_everything", 2**40, "--seed_everything is 1099511627776: it must be at least 0 and at most 4294967295"),
        ("data.corpus", "{text.txt: .inf, tiny.yaml: 1}", "data.corpus is {'text.txt': inf, 'tiny.yaml': 1"),
    ],
)
def test_the_front_door_names_the_key(lm: Any, key: str, value: Any, expected: str) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", f"--{key}", value)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: {expected}"), err


@pytest.mark.parametrize("manual", [False, True])
def test_clipping_by_zero_is_off(lm: Any, manual: bool) -> None:
    """The weights are those of a run that never clips; scaled to nothing they would be those of the start."""
    kind = ("--model", "lm.training.ManualLanguageModel") if manual else ()
    ends = []
    for number, setting in enumerate(
        ("--model.clip_norm=null", "--trainer.gradient_clip_val=0", "--model.clip_norm=0")
    ):
        short = ("--trainer.max_steps", 3, "--name", f"run{number}")
        assert lm("fit", "--config", "tiny.yaml", *short, *kind, setting)[0] == 0
        ends.append(torch.load(f"checkpoints/run{number}/last.ckpt", weights_only=True)["state_dict"])
    assert LanguageModel(models.Bigram, clip_norm=0).step.clip_norm is None
    for end in ends[1:]:
        assert all(torch.equal(value, ends[0][name]) for name, value in end.items())
