"""What `lm plan` says, beside what is."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from lm.cli.plan import BYTES, TIMES, spelled
from lm.models import GPT
from lm.planning import needs
from tests.conftest import MISSING, ROOT
from tests.support.cases import often
from tests.support.recipes import CONFIGS


def test_the_command(lm, workplace: Path) -> None:
    words = ("plan", "--config", "tiny.yaml", "--num_nodes", 2, "--devices", 2, "--gpu", "h100", "--json")
    code, out, err = lm(*words)
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["parameters"] == 4048 and found["strategy"] == "ddp"
    assert found["tokens_per_step"] == 64 and found["micro_batch_size"] == 1
    steps, speed, usage = 12, needs.DEVICES["H100"].flops * 1e12, 0.4
    hours = 64 * steps * found["flops_per_token"] / (speed * usage * 4) / 3600
    assert found["hours"] == pytest.approx(hours, rel=1e-5)
    assert "use trainer.strategy ddp" in err
    assert "fsdp2 + activation_checkpointing" in lm(*words[:-1])[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--gpu", "H10"), "did you mean H100?"),
        (("--devices", 0), "--devices is 0"),
        (("--devices", 3), "data.batch_size 4 is not divisible by 3 processes"),
        (("--mfu", 2), "--mfu is 2"),
    ],
)
def test_bad_input(lm, workplace: Path, words: tuple, expected: str) -> None:
    code, _, err = lm("plan", "--config", "tiny.yaml", *words)
    assert code == 2 and expected in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "config",
    often(CONFIGS, lambda config: config.stem in ("quickstart", "gru", "reverse")),
    ids=lambda path: str(path.relative_to(ROOT / "configs")),
)
def test_every_recipe_is_planned(lm, data_for, config: Path) -> None:
    data = data_for(yaml.safe_load(config.read_text()))
    code, out, err = lm("plan", "--config", config, *data, "--num_nodes", 64 if config.stem == "175b" else 1, "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert {"parameters", "memory_gb_per_device", "tokens_per_step", "hours", "strategy"} <= found.keys()
    multiplies = config.stem != "bigram"  # which looks its logits up
    assert found["memory_gb_per_device"] > 0 and (found["hours"] > 0) == multiplies
    assert " 0.00 " not in err and ("none fits" in err) == (found["remedy"] is not None)


GPT3 = {  # Brown et al. 2020, table 2.1: millions of parameters; layers, width, thousands of tokens a step, rate
    "125m": (125, 12, 768, 500, 6.0e-4),
    "350m": (350, 24, 1024, 500, 3.0e-4),
    "760m": (760, 24, 1536, 500, 2.5e-4),
    "1.3b": (1300, 24, 2048, 1000, 2.0e-4),
    "2.7b": (2700, 32, 2560, 1000, 1.6e-4),
    "6.7b": (6700, 32, 4096, 2000, 1.2e-4),
    "13b": (13000, 40, 5140, 2000, 1.0e-4),
    "175b": (175000, 96, 12288, 3200, 0.6e-4),
}


@pytest.mark.parametrize("name", GPT3)
def test_gpt3s_sizes_are_the_papers(name: str) -> None:
    """One head of 13B makes its width 5120; the paper rounds counts and batches."""
    millions, layers, width, thousands, rate = GPT3[name]
    text = yaml.safe_load((ROOT / f"configs/gpt3/{name}.yaml").read_text())
    net, data = text["model"]["init_args"]["net"]["init_args"], text["data"]["init_args"]
    assert net["n_layer"] == layers and net["n_embd"] == pytest.approx(width, rel=0.004)
    assert data["batch_size"] * 2048 == pytest.approx(1000 * thousands, rel=0.05)
    assert text["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(50257, 2048, **{**net, "n_layer": 1}).parameters())
        block = sum(p.numel() for p in GPT(50257, 2048, **{**net, "n_layer": 2}).parameters()) - count
    assert count + (layers - 1) * block == pytest.approx(1e6 * millions, rel=0.025)
    assert text["trainer"]["max_steps"] * data["batch_size"] * 2048 == pytest.approx(300e9, rel=0.001)


GPT2 = {"124m": 124_439_808, "350m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}
"""What OpenAI's checkpoints have."""


@pytest.mark.parametrize("name", often(GPT2, lambda name: name == "350m"))
def test_gpt2s_sizes_are_openais(lm, data_for, name: str) -> None:
    config = ROOT / f"configs/gpt2-{name}.yaml"
    recipe = yaml.safe_load(config.read_text())
    net, data = recipe["model"]["init_args"]["net"]["init_args"], recipe["data"]["init_args"]
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(50257, data["block_size"], **net).parameters())
    assert count == GPT2[name]
    code, out, err = lm("plan", "--config", config, "--devices", 8, "--json", *data_for(recipe))
    assert code == 0 and (MISSING or json.loads(out)["parameters"] == count), err


def test_one_that_fits_nowhere_is_told_what_would_do(lm, data_for) -> None:
    config = ROOT / "configs/gpt3/175b.yaml"
    words = ("plan", "--config", config, *data_for(yaml.safe_load(config.read_text())))
    code, out, err = lm(*words)
    assert code == 0, err
    assert "none fits: 32 devices would do, with trainer.strategy fsdp2, model.activation_checkpointing true" in out
    net = ("--model.init_args.net.init_args.n_embd", 96 * 4096, "--data.init_args.batch_size", 1)
    assert "none fits: not on any number of these, as one layer and one sequence need" in lm(*words, *net)[1]


@pytest.mark.parametrize("size", [10**9, 10**12, 10**19])
def test_sizes_that_no_tensor_can_have(lm, workplace: Path, size: int) -> None:
    code, _, err = lm("plan", "--config", "tiny.yaml", "--model.init_args.net.init_args.n_embd", 2 * size)
    assert code == 2 and len(err.splitlines()) == 1 and "model.net" in err


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0.0, "0"),
        (1e-9, "3.6 microseconds"),
        (0.5, "30 minutes"),
        (2.0, "2 hours"),
        (36.0, "1.5 days"),
        (8760.0, "1 years"),
    ],
)
def test_units_fit_the_number(hours: float, text: str) -> None:
    assert spelled(hours, TIMES) == text
    assert (
        spelled(2e-5, BYTES) == "20 KB" and spelled(1536.0, BYTES) == "1.54 TB" and spelled(1e-9, BYTES) == "0.001 KB"
    )
