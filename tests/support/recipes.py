"""The recipes in configs/."""

from pathlib import Path

from tests.conftest import ROOT

PREPARE = sorted((ROOT / "configs/prepare").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*PREPARE})


def distinct(config: Path) -> bool:
    """Return whether a recipe is not another's with other sizes, as those of GPT-2 and GPT-3 are."""
    if config.parent.stem == "gpt3":
        return config.stem == "125m"
    return not config.stem.startswith("gpt2-") or config.stem == "gpt2-124m"


NET = "--model.init_args.net.init_args"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16}
