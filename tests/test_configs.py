"""Every recipe is parsed as it is, and trains for two steps at a size that a test can afford."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NET = "--model.init_args.net.init_args"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def test_there_are_recipes() -> None:
    names = {path.stem for path in (ROOT / "configs/names").glob("*")}
    assert {"mlp", "mlp-by-hand", "mlp-context8", "record", "wavenet", "wavenet-large", "wavenet-per-position"} == names
    assert {
        "bigram",
        "addition",
        "reverse",
        "llama",
        "one-head",
        "layernorm",
        "gpt2-124m",
        "quickstart",
        "shakespeare",
        "shakespeare-cpu",
    } <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_recipe(lm, config: Path, request: pytest.FixtureRequest) -> None:
    recipe = yaml.safe_load(config.read_text())
    sizes = recipe["data"]["init_args"]
    text = recipe["data"]["class_path"] == "lm.data.TextData"
    if sizes.get("corpus") in ("shakespeare", "names"):
        request.getfixturevalue("reference")
    words = ["fit", "--config", config, "--trainer.max_steps", 2, "--trainer.accelerator", "cpu"]
    words += ["--trainer.precision", "32-true", "--data.init_args.block_size", 8 if text else sizes["block_size"]]
    words += ["--data.init_args.batch_size", 2 * recipe["trainer"].get("accumulate_grad_batches", 1)]
    arguments = recipe["model"]["init_args"]["net"].get("init_args", {})
    words += [word for name in SMALL.keys() & arguments.keys() for word in (f"{NET}.{name}", SMALL[name])]
    code, out, err = lm(*words)
    assert code == 0, err
    assert "step 2/2  val_loss" in out
