"""The recipes in configs/."""

from pathlib import Path

from tests.conftest import ROOT

PREPARE = sorted((ROOT / "configs/prepare").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*PREPARE, *SWEEPS})


KINDS = {
    *("bigram", "finetune", "quickstart", "names/gru", "names/mlp-by-hand", "names/record", "tasks/reverse"),
    *("posttraining/addition", "posttraining/reward"),
}
"""Recipes that stand for their kind of network and of objective; all run in `make test-slow`."""


def one_of_a_kind(config: Path) -> bool:
    """Return whether a recipe stands for its kind."""
    return str(config.relative_to(ROOT / "configs").with_suffix("")) in KINDS


NET = "--model.init_args.net.init_args"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16}
