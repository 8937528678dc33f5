"""What is logged of steps: means since the line before, rates of each kind, the same after a stop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm.checkpoints import checkpoint
from lm.training.loggers.log_files import read_csv
from lm.training.loggers.step_log import rate_names
from tests.conftest import RECIPE, ROOT
from tests.support.cases import often
from tests.support.ranks import MODULES, finish, run, write_recipe
from tests.support.runs import assert_runs_equal, stop_with
from tests.support.steps import CONSTANT, poison

FIT = ("fit", "--config", "tiny.yaml", "--samples.max_new_tokens", 0)
MUON = ("--model.init_args.optimizer", "lm.training.optimizers.MuonAdamW")


def column(run: str, name: str) -> dict[int, float]:
    rows = read_csv(Path("logs") / run / "metrics.csv")[1]
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


def means(steps: dict[int, float], lines: list[int]) -> list[float]:
    """The mean of each line's steps, those after the line before."""
    first, found = 0, []
    for line in lines:
        found.append(math.fsum(steps[step] for step in range(first + 1, line + 1)) / (line - first))
        first = line
    return found


@pytest.mark.parametrize("module", often(MODULES))
@pytest.mark.parametrize(
    "more", [(), ("--model.init_args.steps_per_call", 4), ("--trainer.accumulate_grad_batches", 2)]
)
def test_a_line_has_the_mean_since_the_line_before_and_its_own_step(lm, workplace: Path, module: str, more: tuple):
    recipe = (*FIT, "--model", f"lm.training.{module}", "--checkpoint.every_n_steps", 12, *more)
    assert lm(*recipe, "--name", "each")[0] == 0
    code, out, _ = lm(*recipe, "--name", "some", "--trainer.log_every_n_steps", 5, "--json")
    assert code == 0
    steps, lines = column("each", "train/loss_step"), [1, 5, 10, 12]
    assert column("each", "train/loss") == steps
    assert column("some", "train/loss_step") == {line: steps[line] for line in lines}
    found = column("some", "train/loss")
    assert [*found] == lines
    assert [*found.values()] == pytest.approx(means(steps, lines), rel=1e-12)
    assert yaml.safe_load(out.splitlines()[-1])["loss"] == found[12]


@pytest.mark.parametrize("stops", often([[5, 7], [3], [11]]))
def test_a_stop_between_two_lines_changes_no_bit_of_them(lm, workplace: Path, stops: list[int]) -> None:
    recipe = (*FIT, "--trainer.log_every_n_steps", 5)
    assert lm(*recipe, "--name", "whole")[0] == 0
    for stop in stops:
        assert lm(*recipe, "--name", "parts", "--ckpt_path", "auto", *stop_with("StopAt", stop))[0] == 143
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")


def test_a_step_that_was_skipped_is_left_out_of_the_mean(lm, workplace: Path) -> None:
    recipe = (*FIT, *CONSTANT, "--model.init_args.on_nonfinite", "skip")
    assert lm(*recipe, "--name", "each", *poison([3, 4], math.nan))[0] == 0
    assert lm(*recipe, "--name", "some", "--trainer.log_every_n_steps", 5, *poison([3, 4], math.nan))[0] == 0
    steps = column("each", "train/loss_step")
    assert 3 not in steps and 4 not in column("each", "train/loss")
    assert column("some", "train/loss")[5] == pytest.approx((steps[2] + steps[5]) / 2, rel=1e-12)


def test_an_earlier_releases_checkpoint_goes_on(lm, workplace: Path) -> None:
    recipe = (*FIT, "--trainer.log_every_n_steps", 5)
    assert lm(*recipe, "--name", "whole")[0] == 0
    saved = torch.load("checkpoints/whole/step=0000005.ckpt", weights_only=True)
    del saved["lm"]["log"], saved["lm"]["sequences"], saved["lm"]["train"]["loss_step"]
    torch.save(saved, "old.ckpt")
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "old.ckpt")[0] == 0
    for name in ("train/loss", "train/tokens"):
        assert column("parts", name) == {step: value for step, value in column("whole", name).items() if step > 5}


@pytest.mark.parametrize("module", often(MODULES))
def test_tokens_weigh_the_same_in_the_mean_however_a_step_is_divided(lm, workplace: Path, module: str) -> None:
    """Of each step, the sum over its predictions divided by their number, by a loop of its own in float64."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "configs/tasks/reverse.yaml").read_text())
    recipe["trainer"] = {**RECIPE["trainer"], "precision": "64-true", "log_every_n_steps": 5, "val_check_interval": 12}
    recipe["model"]["class_path"] = f"lm.training.{module}"
    recipe["model"]["init_args"]["net"]["init_args"] |= {"n_layer": 1, "n_head": 2, "n_embd": 16}
    recipe["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0}}
    recipe["data"]["init_args"]["batch_size"] = 8
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert lm("fit", "--config", "tiny.yaml", "--name", "1x1")[0] == 0
    assert lm("fit", "--config", "tiny.yaml", "--name", "1x8", "--trainer.accumulate_grad_batches", 8)[0] == 0
    finish(run("2x2", 2, "--trainer.accumulate_grad_batches", 2, cwd=workplace))
    from torch.nn import functional as F

    from lm.data import ReverseData
    from lm.generation import load_network

    path = Path("checkpoints/1x1/last.ckpt")
    net = load_network(path).net.double()
    net.load_state_dict(
        {k.removeprefix("net."): v for k, v in checkpoint.load(path)["state_dict"].items()}
    )  # all digits
    data = ReverseData(**recipe["data"]["init_args"], seed=recipe["seed_everything"])
    data.setup("fit")
    dataset = data.train_dataset()
    with torch.no_grad():
        steps = {
            k + 1: float(F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100))
            for k in range(12)
            for tokens, targets in [dataset[k]]
        }
    counts = {int((dataset[k][1] != -100).sum()) for k in range(12)}
    assert len(counts) > 3  # or the weights would not matter
    for name in ("1x1", "1x8", "2x2"):
        assert [*column(name, "train/loss").values()] == pytest.approx(means(steps, [1, 5, 10, 12]), rel=1e-10)


def test_muon_and_adamw_log_a_rate_each(lm, workplace: Path) -> None:
    rates = (f"{MUON[0]}.init_args.lr", 0.004, f"{MUON[0]}.init_args.muon_lr", 0.02)
    code, out, err = lm(*FIT, *MUON, *rates, *CONSTANT)
    assert code == 0, err
    adamw, muon = column("tiny", "train/learning_rate"), column("tiny", "train/learning_rate_muon")
    assert (adamw[12], muon[12]) == (0.004, 0.02)
    assert [*muon.values()] == pytest.approx([5 * rate for rate in adamw.values()], rel=1e-12)
    assert "lr 4.00e-03 muon 2.00e-02  norm" in out


def test_each_distinct_rate_has_a_name() -> None:
    assert rate_names([0.1, 0.1]) == {"learning_rate": 0}
    assert rate_names([0.1, 0.1, 0.2, 0.1, 0.2]) == {"learning_rate": 0, "learning_rate_2": 2}
    assert rate_names([0.2, 0.2, 0.1], ["muon", "muon", ""]) == {"learning_rate": 2, "learning_rate_muon": 0}
    assert rate_names([0.2, 0.2], ["muon", "muon"]) == {"learning_rate": 0}
    assert rate_names([0.1, 0.1, 0.1], ["muon", "", ""]) == {"learning_rate": 1, "learning_rate_muon": 0}


def test_two_ranks_go_on_with_another_batch_size(workplace: Path) -> None:
    """One rank and two, that accumulate, see the same sequences before and after the change."""
    write_recipe(precision="64-true", log_every_n_steps=5, val_check_interval=12)
    words = ("--model.init_args.net.init_args.dropout", 0, "--data.init_args.order", "permutation")
    constant = ("--model.init_args.schedule", "lm.training.schedules.Constant")
    finish(run("start", 1, *words, *constant, "--trainer.max_steps", 4, cwd=workplace))
    more = (*words, *constant, "--ckpt_path", "checkpoints/start/last.ckpt", "--data.init_args.batch_size", 16)
    finish(run("one", 1, *more, cwd=workplace))
    finish(run("two", 2, *more, "--trainer.accumulate_grad_batches", 4, cwd=workplace))
    for name in ("train/loss", "val/loss", "train/tokens"):
        assert column("two", name) == pytest.approx(column("one", name), rel=1e-10)
    saved = [checkpoint.peek(Path(f"checkpoints/{name}/last.ckpt")) for name in ("one", "two")]
    assert [one.sequences for one in saved] == [4 * 8 + 8 * 16] * 2
