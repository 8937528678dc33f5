"""Several optimizer steps in one call of the Trainer's: the same run, to the last bit."""

from pathlib import Path

import pytest

from lm.checkpoints import checkpoint
from lm.training.loggers.log_files import read_csv
from tests.support.runs import assert_equal, stop_with

NET = "--model.init_args.net"
RECIPE = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", 24, "--trainer.val_check_interval", 12]
RECIPE += ["--checkpoint.every_n_steps", 12]


def state(run: str, file: str = "last.ckpt") -> dict:
    saved = checkpoint.load(Path("checkpoints") / run / file)
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "global_step", "random_states")}


def table(run: str) -> list[dict[str, str]]:
    rows = read_csv(Path("logs") / run / "metrics.csv")[1]
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]


@pytest.mark.parametrize("steps", [2, 4, 12])
def test_it_changes_no_bit_and_no_log(lm, workplace: Path, steps: int) -> None:
    assert lm(*RECIPE, "--name", "one")[0] == 0
    code, _, err = lm(*RECIPE, "--name", "many", "--model.init_args.steps_per_call", steps)
    assert code == 0, err
    for file in ("last.ckpt", "best.ckpt", "step=0000012.ckpt"):
        assert_equal(state("one", file), state("many", file))
    assert table("one") == table("many")
    assert len(table("one")) == 24


def test_the_last_call_may_be_shorter_and_the_run_goes_on_from_inside(lm, workplace: Path) -> None:
    constant = ["--model.init_args.schedule", "lm.training.schedules.Constant", "--model.init_args.steps_per_call", 4]
    assert lm(*RECIPE, *constant, "--name", "whole")[0] == 0
    assert lm(*RECIPE, *constant, "--name", "parts", "--trainer.max_steps", 18)[0] == 0
    assert checkpoint.peek(Path("checkpoints/parts/last.ckpt")).step == 18
    assert lm(*RECIPE, *constant, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_equal(state("whole"), state("parts"))


def test_a_signal_stops_at_the_end_of_a_call_and_the_run_resumes(lm, workplace: Path) -> None:
    many = ["--model.init_args.steps_per_call", 4, "--trainer.val_check_interval", 8, "--checkpoint.every_n_steps", 8]
    assert lm(*RECIPE, *many, "--name", "whole")[0] == 0
    code = lm(*RECIPE, *many, "--name", "parts", *stop_with("StopAt", 9))[0]
    assert code == 143
    assert checkpoint.peek(Path("checkpoints/parts/last.ckpt")).step == 12
    assert lm(*RECIPE, *many, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_equal(state("whole"), state("parts"))
    assert table("whole") == table("parts")
    assert [row["step"] for row in table("parts") if row["val/loss"]] == ["8", "16", "24"]


def test_what_is_not_finite_stops_inside_a_call_before_the_weights_are_touched(lm, workplace: Path) -> None:
    plain = ["--model.init_args.net.init_args.dropout", 0]  # masks depend on where in its stream a step begins
    plain += ["--model.init_args.schedule", "lm.training.schedules.Constant"]  # a rate that does not know max_steps
    good = [*RECIPE, *plain, "--name", "good", "--trainer.max_steps", 6, "--trainer.val_check_interval", 6]
    assert lm(*good)[0] == 0
    poison = ["--trainer.callbacks+", "tests.support.stop.PoisonAt", "--trainer.callbacks.step=7"]
    code, _, err = lm(*RECIPE, *plain, "--name", "bad", "--model.init_args.steps_per_call", 12, *poison)
    assert code == 1 and err.startswith("error: step 7: loss nan"), err
    assert_equal(state("good"), state("bad"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainer.precision", "bf16-mixed"], "model.steps_per_call 4 is for one process without accumulation"),
        (["--trainer.accumulate_grad_batches", 2], "model.steps_per_call 4 is for one process"),
        (["--model.init_args.steps_per_call", 0], "model.steps_per_call is 0: it must be at least 1"),
    ],
)
def test_what_does_not_go_with_it(lm, workplace: Path, extra: list, message: str) -> None:
    code, _, err = lm(*RECIPE, "--model.init_args.steps_per_call", 4, *extra)
    assert code == 2
    assert err.startswith("error: ") and message in err, err
    assert err.count("\n") == 1


@pytest.mark.parametrize("interval", ["--trainer.val_check_interval", "--checkpoint.every_n_steps"])
def test_calls_are_cut_so_that_nothing_is_due_inside_one(lm, workplace: Path, interval: str) -> None:
    """The largest number of steps that divides all: 2 for 4 and 6."""
    constant = [*RECIPE, "--trainer.max_steps", 9, interval, 6]
    assert lm(*constant, "--name", "one")[0] == 0
    code, out, err = lm(*constant, "--name", "many", "--model.init_args.steps_per_call", 4)
    assert code == 0, err
    assert "steps_per_call 4 is cut to 2" in out
    assert_equal(state("one"), state("many"))
