"""Pairs of answers, and recipes that learn from them."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lm.models import GPT
from tests.conftest import RECIPE

V, T = 7, 6


def written(count: int = 60) -> None:
    """Write pairs of which the chosen one ends in an exclamation mark."""
    rows = [
        {"prompt": f"say {i}", "chosen": f"{'ab'[i % 2] * (1 + i % 4)}!", "rejected": "ab"[i % 2] * (1 + i % 3)}
        for i in range(count)
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def recipe(kind: str, **settings: Any) -> list[object]:
    """Write a recipe; return the words of the command that runs it."""
    made = deepcopy(RECIPE)
    made["model"]["class_path"] = f"lm.posttraining.{kind}"
    made["model"]["init_args"].update(settings)
    made["model"]["init_args"]["net"]["init_args"]["dropout"] = 0.1
    made["data"] = {
        "class_path": "lm.data.PairData",
        "init_args": {"corpus": "pairs.jsonl", "block_size": 24, "batch_size": 4, "val_fraction": 0.2},
    }
    made["samples"] = {"max_new_tokens": 0}
    Path(f"{kind}.yaml").write_text(yaml.safe_dump(made))
    return ["fit", "--config", f"{kind}.yaml"]


def small() -> partial[GPT]:
    """Return what makes a small network, but for its vocabulary and context."""
    return partial(GPT, n_layer=1, n_head=2, n_embd=8)


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (3, 2, T, V) in float64, targets and numbers of pairs."""
    torch.manual_seed(2)
    logits = torch.randn(3, 2, T, V, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (3, 2, T))
    targets[..., :2] = -100
    targets[:, 1, -1] = -100
    return logits, targets, torch.tensor([2, 0, 1])
