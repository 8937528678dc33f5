"""The recipes in configs/."""

from pathlib import Path

from tests.conftest import ROOT

PREPARE = sorted((ROOT / "configs/prepare").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*PREPARE})


def distinct(config: Path) -> bool:
    """Return whether a recipe is another's with other sizes, as those of GPT-3 are."""
    return config.parent.stem != "gpt3" or config.stem == "125m"


NET = "--model.init_args.net.init_args"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16}
