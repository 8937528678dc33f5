"""What each stage after pretraining is for, and whether it does it: `docs/posttraining.md` has the tables.

    python benchmarks/posttraining.py sft          conversations: exact match, and the end of the turn
    python benchmarks/posttraining.py rewards      three-digit addition: rewards against examples, at equal time
    python benchmarks/posttraining.py preferences  made-up names: the reward model's accuracy by the true reward
    python benchmarks/posttraining.py optimism     names: the true reward against the divergence, for PPO and DPO

Each takes minutes for a seed on two cores; --seeds says which ones, --part a share of the steps, to see it run.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from reproduce import CONFIGS, run

from lm.backprop.policy import log_probabilities
from lm.checkpoints.restore import load_network
from lm.corpus import generated
from lm.data import ChatData
from lm.posttraining import rollouts
from lm.posttraining.rewards import Answer, LearnedReward
from lm.tokenizers import chat

RECIPES = CONFIGS / "posttraining"
INHERIT = ("--data.init_args.tokenizer", "inherit")
TEXTS = 1000
HALF_RIGHT: list[object] = [
    *("--trainer.val_check_interval", 50, "--trainer.callbacks", "EarlyStopping"),
    *("--trainer.callbacks.monitor", "val/exact_match", "--trainer.callbacks.mode", "max"),
    *("--trainer.callbacks.stopping_threshold", 0.45, "--trainer.callbacks.patience", 1000),
]  # it stops at the first evaluation where about half is right


def fit(config: Path, name: str, folder: Path, options: argparse.Namespace, *words: object) -> dict[str, Any]:
    """Run a recipe for its share of the steps; return what it prints."""
    trainer = yaml.safe_load(config.read_text())["trainer"]
    steps = max(8, int(trainer["max_steps"] * options.part))
    few = ["--trainer.max_steps", steps, "--trainer.val_check_interval", min(steps, trainer["val_check_interval"])]
    if options.part < 1:
        few += ["--trainer.log_every_n_steps", 1, "--checkpoint.every_n_steps", steps]
    return run("fit", "--config", config, "--name", name, *few, *words, folder=folder)


def after(name: str) -> list[object]:
    return ["--init_from", f"checkpoints/{name}/last.ckpt"]


def sft(folder: Path, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield exact match and the share of turns that are ended, before and after."""
    for name, few in (("before", ["--trainer.max_steps", 1]), ("after", [])):
        fit(RECIPES / "sft.yaml", name, folder, options, "--seed_everything", seed, *few)
        yield {"network": name} | answered(folder / f"checkpoints/{name}/last.ckpt")


def answered(ckpt_path: Path) -> dict[str, float]:
    """Return the share of held-out conversations whose answers are entirely right, and of turns that end rightly."""
    found = load_network(ckpt_path)
    data = ChatData(packed=False, block_size=128)
    data.tokenizer = found.tokenizer
    data.setup("fit")
    right, whole, ends, turns = 0, 0, 0, 0
    dataset = data.eval_dataset("test")
    with torch.inference_mode():
        for k in range(len(dataset)):
            tokens, targets = dataset[k]
            likeliest = found.net(tokens).argmax(-1)
            good = (likeliest == targets) | (targets < 0)
            end = targets == found.tokenizer.special_ids[chat.END]
            right, whole = right + int(good.all(1).sum()), whole + len(tokens)
            ends, turns = ends + int((good & end).sum()), turns + int(end.sum())
    return {"exact match": right / whole, "ended": ends / turns}


def rewards(folder: Path, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield exact match of a half-trained adder, and of what it becomes in equal time.

    Rewards need no answers, only a judge of them: their problems are drawn from all that are not held out.
    """
    seeded = ("--seed_everything", seed)
    half = CONFIGS / "tasks/addition.yaml"
    few = ("--data.init_args.train_problems", 400)
    steady = ("--model.init_args.schedule", "lm.training.schedules.Constant")
    begin = ("--trainer.max_steps", 2000 if options.part >= 1 else 50, *HALF_RIGHT, *few, *steady, *seeded)
    run("fit", "--config", half, "--name", "half", *begin, folder=folder)
    taught = fit(RECIPES / "addition.yaml", "rewarded", folder, options, *after("half"), *seeded)
    time = f"00:00:{int(taught['seconds']) // 60:02}:{int(taught['seconds']) % 60:02}"
    more = ["--trainer.max_time", time, "--trainer.max_steps", 100_000, "--trainer.val_check_interval", 100_000]
    more += [*steady, *seeded]
    run("fit", "--config", half, "--name", "continued", *after("half"), *more, *few, folder=folder)
    run("fit", "--config", half, "--name", "shown", *after("half"), *more, folder=folder)
    networks = {
        "half": "half-trained, on 400 problems",
        "rewarded": "by rewards",
        "continued": "by the same 400 problems",
        "shown": "by new problems and their answers",
    }
    for name, said in networks.items():
        yield {"network": said, "exact match": right(name, folder)}


def right(name: str, folder: Path) -> float:
    """Return the share of held-out problems that a network solves."""
    words = ("validate", "--ckpt_path", f"checkpoints/{name}/last.ckpt", "--split", "test")
    return float(run(*words, folder=folder)["exact_match"])


def names(folder: Path, options: argparse.Namespace, seed: int) -> None:
    """Fine-tune on names, and fit the reward model."""
    fit(RECIPES / "names.yaml", "names", folder, options, "--seed_everything", seed)
    fit(RECIPES / "reward.yaml", "reward", folder, options, *after("names"), *INHERIT, "--seed_everything", seed)


def preferences(folder: Path, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the share of new pairs that the reward model puts into the order of the true reward."""
    names(folder, options, seed)
    judge = LearnedReward(folder / "checkpoints/reward/last.ckpt")
    draw = random.Random(99)
    pairs = [(generated.name(draw), generated.name(draw)) for _ in range(4000)]
    pairs = [one for one in pairs if generated.gold_reward(one[0]) != generated.gold_reward(one[1])]
    texts = [text for pair in pairs for text in pair]
    learned = judge([_answer(judge, text) for text in texts])
    wanted = [generated.gold_reward(text) for text in texts]
    right = [(learned[i] > learned[i + 1]) == (wanted[i] > wanted[i + 1]) for i in range(0, len(texts), 2)]
    yield {"network": "reward model", "new pairs": len(pairs), "in order": sum(right) / len(right)}


def _answer(judge: LearnedReward, text: str) -> Answer:
    messages = [{"role": "user", "content": generated.ASKED}, {"role": "assistant", "content": text}]
    return Answer(generated.ASKED, text, "", True, chat.encode(judge.tokenizer, messages)[0].tolist())


def optimism(folder: Path, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the divergence, the learned and the true reward of policies that went further and further."""
    names(folder, options, seed)
    learned = "--model.init_args.reward=lm.posttraining.rewards.LearnedReward"
    path = ("--model.init_args.reward.init_args.ckpt_path", "checkpoints/reward/last.ckpt")
    judge = LearnedReward(folder / "checkpoints/reward/last.ckpt")
    yield {"policy": "fine-tuned"} | measured(folder, "names", judge)
    for kl in (3.0, 1.0, 0.3, 0.1, 0.03, 0.0):
        words = [*after("names"), *INHERIT, learned, *path, "--model.init_args.kl", kl, "--seed_everything", seed]
        fit(RECIPES / "ppo.yaml", f"ppo-{kl}", folder, options, *words)
        yield {"policy": f"PPO, kl {kl}"} | measured(folder, f"ppo-{kl}", judge)
    for beta in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01):
        words = [*after("names"), *INHERIT, "--model.init_args.beta", beta, "--seed_everything", seed]
        fit(RECIPES / "dpo.yaml", f"dpo-{beta}", folder, options, *words)
        yield {"policy": f"DPO, beta {beta}"} | measured(folder, f"dpo-{beta}", judge)


@torch.inference_mode()
def measured(folder: Path, name: str, judge: LearnedReward) -> dict[str, float]:
    """Return a policy's divergence from the fine-tuned network, and the rewards of what it writes."""
    policy, before = (load_network(folder / f"checkpoints/{one}/last.ckpt") for one in (name, "names"))
    tokenizer = policy.tokenizer
    asked, _ = chat.encode(tokenizer, [{"role": "user", "content": generated.ASKED}])
    prompt = [*asked.tolist(), tokenizer.special_ids[chat.MARKS["assistant"]]]
    answers = rollouts.written(policy.net, tokenizer, [(prompt, [])], list(range(TEXTS)), None, judge.readable)
    tokens, targets = rollouts.sequences(answers, [len(prompt)] * TEXTS, int(policy.net.block_size))  # type: ignore[arg-type]
    logs = [log_probabilities(one.net(tokens), targets)[0].sum(1) for one in (policy, before)]
    gold = [generated.gold_reward(one.text) for one in answers]
    return {
        "divergence": float((logs[0] - logs[1]).mean()),
        "learned reward": sum(judge(answers)) / TEXTS,
        "true reward": sum(gold) / TEXTS,
    }


STAGES = {one.__name__: one for one in (sft, rewards, preferences, optimism)}


def main() -> None:
    """Run a stage for each seed, and print the table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--part", type=float, default=1.0)
    options = parser.parse_args()
    rows: dict[int, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            rows[seed] = list(STAGES[options.stage](Path(temporary), seed, options))
    names = list(next(iter(rows.values()))[0])
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for same in zip(*rows.values(), strict=True):
        values = [
            same[0][name] if isinstance(same[0][name], str) else median(one[name] for one in same) for name in names
        ]
        print(f"| {' | '.join(one if isinstance(one, str) else f'{one:.4g}' for one in values)} |")


if __name__ == "__main__":
    main()
