import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm.posttraining.rewards import Answer, Reward
from tests.conftest import RECIPE
from tests.support.cases import often
from tests.support.runs import assert_runs_equal, stop_with, table


class Short(Reward):
    """A reward of a user's own: the shorter, the better."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [-float(len(one.text)) for one in answers]


class Whole(Reward):
    """Gives whole numbers, as a user's may."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [len(one.text) for one in answers]


class Odd(Reward):
    """Gives what is no number for each answer."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, answers: list[Answer]) -> Any:
        kinds = {"one": [1.0], "nothing": None, "numbers by key": dict.fromkeys(range(len(answers)), 1.0)}
        return (kinds | {"too large": [10**400] * len(answers), "a table": torch.ones(len(answers), 2)})[self.what]


class Broken(Reward):
    def __call__(self, answers: list[Answer]) -> list[float]:
        return [float("nan") if i == 3 else 1.0 for i in range(len(answers))]


def recipe(kind: str = "PolicyGradient", **settings: Any) -> list[object]:
    made = deepcopy(RECIPE)
    own = {"group": 4, "max_new_tokens": 4, "reward": f"{__name__}.Short"} | settings
    made["model"]["class_path"] = f"lm.posttraining.{kind}"
    made["model"]["init_args"].update(own, optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}})
    sums = {"digits": 1, "block_size": 8, "batch_size": 4, "held_out": 10}
    made["data"] = {"class_path": "lm.data.ArithmeticData", "init_args": sums}
    made["samples"] = {"max_new_tokens": 0}
    Path("policy.yaml").write_text(yaml.safe_dump(made))
    return ["fit", "--config", "policy.yaml"]


def odd(what: str) -> dict[str, Any]:
    return {"class_path": f"{__name__}.Odd", "init_args": {"what": what}}


FOUR = ["--trainer.val_check_interval", 4, "--checkpoint.every_n_steps", 4]  # or calls are cut to fewer steps


def figures(run: str, name: str) -> list[float]:
    return [float(row[name]) for row in table(run) if row.get(name)]


@pytest.mark.parametrize("kind", often(("PolicyGradient", "ManualPolicyGradient")))
def test_before_the_first_update_the_ratio_is_1_and_the_divergence_0(lm, workplace: Path, kind: str) -> None:
    code, _, err = lm(*recipe(kind, kl=0.1), "--trainer.max_steps", 2)
    assert code == 0, err
    assert figures("policy", "train/kl")[0] == 0 and figures("policy", "train/clipped") == [0, 0]
    assert figures("policy", "train/kl")[1] != 0
    assert figures("policy", "train/ratio") == [1, 1], "a step of its own for each set of texts"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
def test_it_learns_and_a_stopped_run_draws_the_same_texts(lm, workplace: Path, steps: int) -> None:
    words = [*recipe(kl=0.01, steps_per_call=steps), "--trainer.max_steps", 60, "--trainer.val_check_interval", 12]
    words += ["--checkpoint.every_n_steps", 12]
    assert lm(*words, "--name", "whole")[0] == 0
    assert lm(*words, "--name", "parts", *stop_with("StopAt", 25))[0] == 143
    assert lm(*words, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")
    rewards = figures("whole", "train/reward")
    assert rewards[-1] > rewards[0] + 0.5
    if steps > 1:
        assert max(figures("whole", "train/clipped")) > 0


@pytest.mark.slow
def test_training_by_hand_is_training_by_autograd(lm, workplace: Path) -> None:
    tables = []
    for kind in ("PolicyGradient", "ManualPolicyGradient"):
        words = recipe(kind, kl=0.05, scale_rewards=True, loss_mean="group", steps_per_call=3)
        code, _, err = lm(*words, "--trainer.precision", "64-true", "--name", kind)
        assert code == 0, err
        tables.append(table(kind))
    for one, other in zip(*tables, strict=True):
        for key in ("train/loss", "train/gradient_norm", "train/reward", "val/loss"):
            if one[key]:
                assert float(other[key]) == pytest.approx(float(one[key]), rel=1e-8, abs=1e-10), key


def test_what_does_not_go_together(lm, workplace: Path) -> None:
    learned = {"class_path": "lm.posttraining.rewards.LearnedReward", "init_args": {"ckpt_path": "no.ckpt"}}
    Path("chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    for settings, words, message in (
        ({}, ["--data", "lm.data.TextData", "--data.init_args.corpus", "text.txt"], "data TextData has none"),
        ({"group": 1}, [], "model.group is 1: it must be at least 2"),
        ({"loss_mean": "median"}, [], "loss_mean"),
        ({"reward": learned}, [], "checkpoint no.ckpt: there is no such file"),
        ({"reward": f"{__name__}.Broken"}, [], "note: model.reward Broken gives nan for the answer"),
        *(
            ({"reward": odd(what)}, [], "model.reward Odd gives ")
            for what in ("one", "nothing", "numbers by key", "too large", "a table")
        ),
        ({"spike": 3}, [], "model.spike: "),
        ({"loss_mean": "token"}, ["--trainer.accumulate_grad_batches", 2], "model.loss_mean token: "),
    ):
        code, _, err = lm(*recipe(**settings), *words, "--name", len(list(Path("checkpoints").glob("*"))))
        assert code in (1, 2) and message in err and len(err.splitlines()) <= 2, err


def test_what_does_not_go_on(lm, workplace: Path) -> None:
    words = [*recipe(kl=0.1, reward=f"{__name__}.Whole"), "--trainer.max_steps", 2, "--checkpoint.every_n_steps", 1]
    assert lm(*words)[0] == 0
    for more, message in (
        (["--model.init_args.kl", 0, "--trainer.max_steps", 4], "has another reference than is held to"),
        (["--model.init_args.steps_per_call", 4, *FOUR, "--trainer.max_steps", 8], "the checkpoint is of step 2"),
    ):
        code, _, err = lm(*words, *more, "--ckpt_path", "last")
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_the_whole_road(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuned on names, a reward model, a policy that it teaches: one command each."""
    import io

    from tests.conftest import ROOT

    configs = ROOT / "configs/posttraining"
    few = ["--trainer.max_steps", 60, "--trainer.val_check_interval", 60]
    begin = ["--init_from", "checkpoints/names/last.ckpt", "--data.init_args.tokenizer", "inherit"]
    assert lm("fit", "--config", configs / "names.yaml", *few)[0] == 0
    code, _, err = lm("fit", "--config", configs / "reward.yaml", *few, *begin)
    assert code == 0, err
    learned = "--model.init_args.reward=lm.posttraining.rewards.LearnedReward"
    path = ["--model.init_args.reward.init_args.ckpt_path", "checkpoints/reward/last.ckpt"]
    code, out, err = lm("fit", "--config", configs / "ppo.yaml", *few, *begin, learned, *path, "--json")
    assert code == 0, err
    rewards = figures("ppo", "train/reward")
    assert rewards[-1] > rewards[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("Write a name.\n"))
    code, out, _ = lm("chat", "--ckpt_path", "checkpoints/ppo/last.ckpt", "--max_new_tokens", 20)
    assert code == 0 and json.dumps(out)
