"""Steps that are not to be trusted, and tokens that weigh the same wherever they are."""

from pathlib import Path
from typing import Literal

import pytest
import yaml

from lm.checkpoints import checkpoint
from lm.errors import CheckError
from lm.training.guard import Guard
from tests.conftest import RECIPE, ROOT
from tests.support.cases import often
from tests.support.ranks import MODULES, finish, numbers, run, write_recipe
from tests.support.runs import assert_equal
from tests.support.steps import CONSTANT, poison


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("factor", "spike"), [(float("nan"), "null"), (300, "1.5")])
def test_a_skipped_step_leaves_no_trace(lm, workplace: Path, module: str, factor: float, spike: str) -> None:
    recipe = ("fit", "--config", "tiny.yaml", "--model", f"lm.training.{module}", *CONSTANT)
    assert lm(*recipe, "--name", "eleven", "--trainer.max_steps", 11)[0] == 0
    words = ("--model.init_args.on_nonfinite", "skip", "--model.init_args.spike", spike)
    code, out, _ = lm(*recipe, "--name", "skipped", *words, *poison([12], factor))
    assert code == 0 and out.count("skipped, 1 so far") == 1 and "step 12" in out
    skipped, eleven = (checkpoint.load(Path(f"checkpoints/{name}/last.ckpt")) for name in ("skipped", "eleven"))
    assert skipped["lm"]["guard"]["skipped"] == 1 and skipped["global_step"] == 12
    assert_equal(skipped["state_dict"], eleven["state_dict"])
    assert_equal(skipped["optimizer_states"][0]["state"], eleven["optimizer_states"][0]["state"])


@pytest.mark.parametrize("module", MODULES)
def test_both_ranks_skip_what_one_of_them_spoils(workplace: Path, module: str) -> None:
    write_recipe(precision="64-true")
    words = (
        "--model",
        f"lm.training.{module}",
        "--model.init_args.on_nonfinite",
        "skip",
        "--watch.drift_every_n_steps",
        1,
    )
    finish(run("both", 2, *words, *poison([6], float("nan"), rank=1), cwd=workplace))
    saved = checkpoint.load(Path("checkpoints/both/last.ckpt"))
    assert saved["global_step"] == 12 and saved["lm"]["guard"]["skipped"] == 1


def test_a_run_that_skips_without_end_stops(lm, workplace: Path) -> None:
    words = ("--model.init_args.on_nonfinite", "skip", "--trainer.max_steps", 40)
    code, _, err = lm("fit", "--config", "tiny.yaml", *words, *poison(list(range(5, 41)), float("nan")))
    assert code == 1 and "step 25" in err and "20 steps in a row were skipped" in err
    assert checkpoint.peek(Path("checkpoints/tiny/last.ckpt")).step == 24


def test_a_spike_is_judged_by_the_running_mean() -> None:
    guard = Guard(spike=2.0)
    for step in range(50):
        assert guard.verdict(step, 3.0, 1.0, scaled=False) is None
    again = Guard(on_nonfinite="skip", spike=2.0)
    again.load_state_dict(guard.state_dict())
    assert again.verdict(51, 5.9, 1.0, scaled=False) is None
    assert "spike: its mean was 3.0" in str(again.verdict(52, 6.3, 1.0, scaled=False))
    with pytest.raises(CheckError, match="spike"):
        guard.verdict(51, 6.3, 1.0, scaled=False)
    assert again.verdict(53, 3.0, float("inf"), scaled=True) is None  # the loss scaler's own business


@pytest.mark.parametrize("module", often(MODULES))
def test_each_token_weighs_the_same_however_the_batch_is_divided(lm, workplace: Path, module: str) -> None:
    """Strings of different lengths: the micro-batches have different numbers of predicted tokens."""
    recipe = yaml.safe_load((ROOT / "configs/tasks/reverse.yaml").read_text())
    recipe["trainer"] = {**RECIPE["trainer"], "precision": "64-true"}
    recipe["model"]["class_path"] = f"lm.training.{module}"
    recipe["model"]["init_args"]["net"]["init_args"] |= {"n_layer": 1, "n_head": 2, "n_embd": 16}
    recipe["data"]["init_args"]["batch_size"] = 8
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
    for accumulate in (1, 8):
        words = ("--trainer.accumulate_grad_batches", accumulate, "--name", f"1x{accumulate}")
        assert lm("fit", "--config", "tiny.yaml", *words)[0] == 0
    finish(run("2x2", 2, "--trainer.accumulate_grad_batches", 2, cwd=workplace))
    whole = numbers("1x1")
    assert len(whole) >= 24
    for divided in ("1x8", "2x2"):
        assert numbers(divided) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize(("on_nonfinite", "advised"), [("stop", True), ("skip", False)])
def test_what_is_set_is_not_advised(on_nonfinite: Literal["stop", "skip"], advised: bool) -> None:
    guard = Guard(on_nonfinite)
    guard.cause, guard.in_a_row = "model.reward Broken gives nan", 0 if on_nonfinite == "stop" else 20
    with pytest.raises(CheckError, match="a corrected reward") as caught:
        guard.verdict(21, float("nan"), 1.0, scaled=False)
    assert ("model.on_nonfinite skip" in str(caught.value)) == advised
