import json
import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lm.backprop import Gradients
from lm.backprop.policy import log_probabilities
from lm.posttraining.reward_model import scalar_head
from lm.posttraining.rewards import Answer, Reward
from lm.posttraining.rollouts import Experience
from lm.training.by_hand import StepByHand
from lm.training.guard import Guard
from lm.training.loggers.step_log import StepLog
from lm.training.objectives import CrossEntropy
from lm.training.schedules import Constant
from lm.training.step import Step
from tests.conftest import RECIPE, start
from tests.support.cases import often
from tests.support.mutants import Mutant, broken
from tests.support.pairs import T, V, example, small
from tests.support.ranks import finish
from tests.support.runs import assert_runs_equal, stop_with, table


class Short(Reward):
    """A reward of a user's own: the shorter, the better."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [-float(len(one.text)) for one in answers]


class Whole(Reward):
    """Gives whole numbers, as a user's may."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [len(one.text) for one in answers]


class Two(Reward):
    """The same for all."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [2.0] * len(answers)


class OnSecond(Reward):
    """Is not finite on the second process."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [float("inf") if os.environ.get("LOCAL_RANK") == "1" else 1.0] * len(answers)


class Unwritten(Reward):
    """Lacks what makes it a reward."""


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


HAND = "posttraining.policy_gradient:loss_by_hand"
MUTANTS = [
    Mutant(HAND, "self.value * weights * dvalues", "weights * dvalues", "the value's weight"),
    Mutant(HAND, "self.value * weights * dvalues", "self.value * dvalues", "the tokens' weights"),
    Mutant(HAND, "-self.entropy * weights", "self.entropy * weights", "the entropy's sign"),
    Mutant(HAND, "weights * dlogs", "dlogs", "the weights of the ratio"),
    Mutant(HAND, "losses - self.entropy * spread", "losses", "an entropy that is not in the loss"),
    Mutant(HAND, "losses + self.value * errors", "losses", "a value that is not in the loss"),
]


def check_gradient() -> None:
    """Of both networks, by hand and by autograd, in float64."""
    import lm.posttraining.policy_gradient as place

    torch.manual_seed(1)
    model = place.ManualPolicyGradient(net=small(), value=0.7, entropy=0.3)
    model.net = small()(V, T).double()
    model.critic = deepcopy(model.net)
    scalar_head(model.critic)
    torch.nn.init.normal_(model.critic.lm_head.weight)
    logits, targets, _ = example()
    tokens, targets = torch.randint(V, (6, T)), targets.flatten(0, 1)
    old, better, earned, weights = torch.randn(4, 6, T, dtype=torch.float64)
    old = log_probabilities(logits.detach().flatten(0, 1), targets)[0] + 0.2 * old
    step = Experience(tokens, targets, old, better, earned, weights.abs() * (targets >= 0), torch.zeros(6, 3))
    parameters = [parameter for net in model.fitted for parameter in net.parameters()]
    loss = model.loss(*step)
    wanted = torch.autograd.grad(loss, parameters)
    model._by_hand = StepByHand(model.net, parameters, Gradients())
    with torch.no_grad():
        torch.testing.assert_close(model.loss_by_hand(*step, last=True), loss.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)
    clipped = model.figures.compute()["clipped"]
    assert 0 < clipped < 1


def test_the_gradient_by_hand_is_autograds() -> None:
    check_gradient()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_gradient_is_found(mutant: Mutant) -> None:
    with broken(mutant), pytest.raises(AssertionError):
        check_gradient()


def every(steps: int) -> list[object]:
    """Evaluations and checkpoints between sets of texts of so many steps."""
    return ["--trainer.val_check_interval", steps, "--checkpoint.every_n_steps", steps]


def figures(run: str, name: str) -> list[float]:
    return [float(row[name]) for row in table(run) if row.get(name)]


def shown(run: str) -> list[tuple[int, str]]:
    """The texts that TensorBoard has of a policy, and the steps that they are of."""
    found = []
    for path in sorted((Path("logs") / run).glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            texts = [v.tensor.string_val[0].decode() for v in event.summary.value if v.tag == "rollouts/text_summary"]
            found += [(event.step, text) for text in texts]
    return found


@pytest.mark.parametrize("kind", often(("PolicyGradient", "ManualPolicyGradient")))
def test_before_the_first_update_the_ratio_is_1_and_the_divergence_0(lm, workplace: Path, kind: str) -> None:
    """And the value network expects nothing, so each token's error is the text's reward, 2: ½ 2²."""
    words = recipe(kind, kl=0.1, value=0.5, gae=1.0, entropy=0.01, reward=f"{__name__}.Two")
    code, _, err = lm(*words, "--trainer.max_steps", 2)
    assert code == 0, err
    assert figures("policy", "train/kl")[0] == 0 and figures("policy", "train/clipped") == [0, 0]
    assert figures("policy", "train/kl")[1] != 0
    assert figures("policy", "train/ratio") == [1, 1], "a step of its own for each set of texts"
    assert figures("policy", "train/value_loss")[0] == 2 > figures("policy", "train/value_loss")[1]
    assert all(0 < one < math.log(14) for one in figures("policy", "train/entropy"))
    texts = shown("policy")
    assert [step for step, _ in texts] == [1, 2] and texts[0][1].count("    2  ") == 4, "rewards and texts"


def test_figures_are_of_all_micro_batches(lm, workplace: Path) -> None:
    tables = []
    for parts in (1, 2):
        words = [*recipe(kl=0.1, value=0.5, entropy=0.01), "--trainer.accumulate_grad_batches", parts]
        code, _, err = lm(*words, "--trainer.max_steps", 3, "--trainer.precision", "64-true", "--name", parts)
        assert code == 0, err
        tables.append(table(str(parts)))
    assert_alike(*tables)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PolicyGradient", "ManualPolicyGradient"])
def test_figures_are_of_all_processes(lm, workplace: Path, kind: str) -> None:
    words = [*recipe(kind, kl=0.1, value=0.5, entropy=0.01), "--trainer.max_steps", 4]
    words += ["--trainer.precision", "64-true"]
    assert lm(*words, "--name", "one")[0] == 0
    finish(start(*words, "--trainer.devices", 2, "--name", "two", cwd=workplace, ranks=2))
    assert_alike(table("one"), table("two"))


@pytest.mark.slow
def test_what_one_process_finds_not_finite_is_named_by_all(lm, workplace: Path) -> None:
    words = [*recipe(reward=f"{__name__}.OnSecond", on_nonfinite="skip"), "--trainer.max_steps", 2]
    process = start(*words, "--trainer.devices", 2, cwd=workplace, ranks=2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    said = "model.reward OnSecond gives inf for the answer '"
    assert said in out + err and "the batch was skipped, 2 so far" in out + err, out + err


def assert_alike(*tables: list[dict[str, str]]) -> None:
    assert len(tables[0]) >= 3
    for one, other in zip(*tables, strict=True):
        names = [name for name in one if name.startswith(("train/", "val/"))]
        assert {"train/reward", "train/kl", "train/entropy", "train/value_loss", "train/answer_tokens"} < {*names}
        for name in names:
            assert (one[name] == "") == (other[name] == ""), name
            if one[name]:
                assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-8, abs=1e-10), name


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "settings"), [(1, {}), (3, {}), (3, {"value": 0.5, "entropy": 1e-3})])
def test_it_learns_and_a_stopped_run_draws_the_same_texts(lm, workplace: Path, steps: int, settings: Any) -> None:
    words = [
        *recipe(kl=0.01, steps_per_call=steps, **settings),
        "--trainer.max_steps",
        60,
        "--trainer.val_check_interval",
        12,
    ]
    words += ["--checkpoint.every_n_steps", 12]
    assert lm(*words, "--name", "whole")[0] == 0
    assert lm(*words, "--name", "parts", *stop_with("StopAt", 25))[0] == 143
    assert lm(*words, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")
    assert shown("whole") == shown("parts")
    rewards = figures("whole", "train/reward")
    assert rewards[-1] > rewards[0] + 0.5
    if steps > 1:
        assert max(figures("whole", "train/clipped")) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"value": 0.5, "entropy": 0.01, "loss_mean": "sequence"},
        {"scale_rewards": True, "loss_mean": "group", "entropy": 0.01},
    ],
)
def test_training_by_hand_is_training_by_autograd(lm, workplace: Path, settings: dict[str, Any]) -> None:
    tables = []
    for kind in ("PolicyGradient", "ManualPolicyGradient"):
        words = recipe(kind, kl=0.05, steps_per_call=3, **settings)
        code, _, err = lm(*words, *every(3), "--trainer.precision", "64-true", "--name", kind)
        assert code == 0, err
        tables.append(table(kind))
    for one, other in zip(*tables, strict=True):
        for key in one:
            if one[key] and key.startswith(("train/", "val/")):
                assert float(other[key]) == pytest.approx(float(one[key]), rel=1e-8, abs=1e-10), key


def test_what_does_not_go_together(lm, workplace: Path) -> None:
    learned = {"class_path": "lm.posttraining.rewards.LearnedReward", "init_args": {"ckpt_path": "no.ckpt"}}
    Path("chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    for settings, words, message in (
        ({}, ["--data", "lm.data.TextData", "--data.init_args.corpus", "text.txt"], "data TextData has none"),
        ({"group": 1}, [], "model.group is 1: it must be at least 2"),
        ({"loss_mean": "median"}, [], "loss_mean"),
        ({"reward": learned}, [], "checkpoint no.ckpt: there is no such file"),
        ({"reward": f"{__name__}.Broken"}, [], "step 1: model.reward Broken gives nan for the answer '"),
        ({"reward": f"{__name__}.Unwritten"}, [], "model.reward Unwritten lacks the method __call__(self, answers)"),
        ({"value": 0.5, "scale_rewards": True}, [], "model.scale_rewards: with model.value"),
        ({"value": 0.5, "net": {"class_path": "lm.models.Bigram"}}, [], "Bigram has no lm_head"),
        *(
            ({"reward": odd(what)}, [], "model.reward Odd gives ")
            for what in ("one", "nothing", "numbers by key", "too large", "a table")
        ),
        ({"spike": 3}, [], "model.spike: "),
        ({"gae": 1.0}, [], "model.gae 1.0 is for a value network"),
        (
            {"steps_per_call": 4},
            ["--trainer.val_check_interval", 6],
            "trainer.val_check_interval 6 and checkpoint.every_n_steps 5 would fall within: use multiples of 4",
        ),
        ({"loss_mean": "token"}, ["--trainer.accumulate_grad_batches", 2], "model.loss_mean token: "),
    ):
        code, _, err = lm(*recipe(**settings), *words, "--name", len(list(Path("checkpoints").glob("*"))))
        assert code in (1, 2) and message in err and len(err.splitlines()) == 1, err


def test_what_does_not_go_on(lm, workplace: Path) -> None:
    words = recipe(kl=0.1, value=0.5, reward=f"{__name__}.Whole")
    words += ["--trainer.max_steps", 2, "--checkpoint.every_n_steps", 1]
    assert lm(*words)[0] == 0
    for more, message in (
        (["--model.init_args.kl", 0, "--trainer.max_steps", 4], "has a reference, and the recipe's model needs none"),
        (["--model.init_args.value", 0, "--trainer.max_steps", 4], "has a value network, and the recipe's"),
        (["--model.init_args.steps_per_call", 4, *every(4), "--trainer.max_steps", 8], "the checkpoint is of step 2"),
    ):
        code, _, err = lm(*words, *more, "--ckpt_path", "last")
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


class OnceBroken(Reward):
    """Is not finite for an answer of the first step's."""

    def __call__(self, answers: list[Answer]) -> list[float]:
        return [float("nan") if i == 3 else float(len(one.text)) for i, one in enumerate(answers)]


def test_a_reward_that_is_not_finite_is_the_cause_of_its_own_step_alone(lm, workplace: Path) -> None:
    words = recipe(steps_per_call=2, on_nonfinite="skip", reward=f"{__name__}.OnceBroken")
    code, out, err = lm(*words, *every(2), "--trainer.max_steps", 2)
    assert code == 0 and "step 1: model.reward OnceBroken gives nan for the answer '" in out + err, err
    assert (out + err).count("the batch was skipped") == 1


def test_a_value_networks_gradient_does_not_scale_the_policys_down() -> None:
    """Whatever the reward's scale: each network is clipped by itself, and the norm that is logged is of both."""
    changes = []
    for scale in (1.0, 1000.0):
        policy, critic = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=1.0)
        step = Step(CrossEntropy(), Constant(), 1.0, Guard(), StepLog())
        step.configure([policy, critic], optimizer)
        step._optimizer, step._scaler, step._leaves_out = optimizer, None, False
        policy.weight.grad, critic.weight.grad = torch.tensor([[0.3, 0.4]]), scale * torch.tensor([[3.0, 4.0]])
        step.losses.append(torch.tensor(1.0))
        step.settle(1)
        assert float(step._norm) == pytest.approx(math.hypot(0.5, 5 * scale))
        torch.testing.assert_close(critic.weight.grad, torch.tensor([[0.6, 0.8]]))
        changes.append(policy.weight.grad.tolist())
    assert changes == [torch.tensor([[0.3, 0.4]]).tolist()] * 2


def test_another_number_of_steps_on_a_set_of_texts_is_told_when_a_run_goes_on(lm, workplace: Path) -> None:
    assert lm(*recipe(steps_per_call=2), *every(2), "--trainer.max_steps", 4)[0] == 0
    code, out, err = lm(*recipe(steps_per_call=4), *every(4), "--trainer.max_steps", 8, "--ckpt_path", "last")
    assert code == 0 and "steps_per_call 2 → 4" in out + err, out + err


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
