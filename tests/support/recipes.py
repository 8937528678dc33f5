"""The recipes in configs/."""

import re
from pathlib import Path

from tests.conftest import ROOT

PREPARE = sorted((ROOT / "configs/prepare").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*PREPARE, *SWEEPS})


def distinct(config: Path) -> bool:
    """Return whether a recipe is not another's with other numbers, as those of GPT-2 and GPT-3 are."""
    if config.parent.stem == "gpt3":
        return config.stem == "125m"
    if config.stem.startswith("gpt2-"):
        return config.stem == "gpt2-124m"
    if config.parent.stem == "scaling":
        return config.stem == "width-64"
    return config.stem not in ("one-head", "mlp-context8", "wavenet-large")


def classes(config: Path) -> set[str]:
    """Return the classes that a recipe names."""
    return set(re.findall(r"class_path: ([\w.]+)", config.read_text()))


def first_of_its_classes(config: Path) -> bool:
    """Return whether no recipe before it is made of the same classes; one of a file's recurrent ones stands for all."""
    if config.stem in ("lstm", "rnn"):
        return False
    return all(classes(other) != classes(config) for other in CONFIGS[: CONFIGS.index(config)])


KINDS = ("names/gru", "names/mlp-by-hand", "names/record", "posttraining/reward", "quickstart", "tasks/reverse")


def one_of_a_kind(config: Path) -> bool:
    """Return whether a recipe stands for its kind of network and objective where each would take seconds."""
    return str(config.relative_to(ROOT / "configs").with_suffix("")) in KINDS


NET = "--model.init_args.net.init_args"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16}
