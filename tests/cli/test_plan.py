"""What `lm plan` says, beside what is."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed
from torch.optim import AdamW

from lm.cli.plan import BYTES, TIMES, spelled
from lm.models import GPT, GatedWaveNet, Seq2Seq
from lm.planning import needs
from tests.conftest import MISSING, ROOT
from tests.support.cases import often
from tests.support.recipes import CONFIGS, distinct

MEASURE = """
import json, sys, torch
from torch.nn import functional as F
from lm.models import GPT
from lm.training.compute import recompute_blocks
from tests.cli.test_plan import CASES, recipe_of
def read(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
torch.set_num_threads(1)
warm = torch.randn(64, 64, requires_grad=True)
with torch.autocast("cpu", torch.bfloat16):
    F.cross_entropy(warm @ warm, torch.zeros(64, dtype=torch.long)).backward()
before = read("VmRSS")
recipe = recipe_of(*CASES[sys.argv[1]][0])
net = recipe.build()
if CASES[sys.argv[1]][1]:
    recompute_blocks(net)
optimizer = recipe.make_optimizer(net.parameters())
tokens = torch.zeros(recipe.tokens, dtype=torch.long)
for _ in range(2):
    recipe.forward_backward(net, tokens, tokens)
    optimizer.step()
    optimizer.zero_grad()
print(read("VmHWM") - before)
"""


def recipe_of(vocab: int, size: dict, batch: int, precision: str = "32-true") -> needs.Recipe:
    shape = (batch, 256)
    return needs.Recipe(
        lambda: GPT(vocab, 256, **size), lambda groups: AdamW(groups, fused=True), shape, shape, precision
    )


BIG = {"n_layer": 4, "n_head": 6, "n_embd": 384, "bias": False}
LLAMA = {"n_layer": 3, "n_head": 4, "n_embd": 384, "n_kv_head": 2, "norm": "rms", "positions": "rotary"}
LLAMA |= {"feed_forward": "swiglu", "tie_weights": False}
CASES = {
    "gpt": ((5000, BIG, 4), False),
    "recomputed": ((5000, BIG, 4), True),
    "llama": ((8000, LLAMA, 4), False),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("case", often(CASES, 0))
def test_the_peak_is_within_15_percent_of_what_the_process_takes(case: str) -> None:
    arguments, recompute = CASES[case]
    predicted = needs.memory(recipe_of(*arguments), recompute=recompute).peak
    # so that what is freed is given back, and the largest resident size is that of the tensors
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, case], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert predicted == pytest.approx(int(done.stdout), rel=0.15)


def test_parameters_and_flops_are_exact_for_a_network_that_can_be_counted_by_hand() -> None:
    recipe = recipe_of(100, {"n_layer": 2, "n_head": 2, "n_embd": 16, "bias": False}, 3)
    net = recipe.make_net()
    assert needs.parameters(recipe) == sum(p.numel() for p in net.parameters())
    matrices = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 2 and name != "wpe.weight")
    attention = 2 * 2 * 2 * 256 * 16  # layers x (scores, values) x 2 x T x C
    assert needs.flops_per_token(recipe) == 3 * (2 * matrices + attention)


@pytest.mark.parametrize("processes", [2, 3, 1024])
def test_shares_are_those_of_the_largest_rank_and_nothing_is_left_behind(processes: int) -> None:
    recipe = recipe_of(100, {"n_layer": 2, "n_head": 2, "n_embd": 48}, 3)
    rows = {name: p.shape[0] for name, p in recipe.make_net().named_parameters()}
    expected = sum(p.numel() // rows[n] * -(-rows[n] // processes) for n, p in recipe.make_net().named_parameters())
    assert needs.largest_share(recipe, processes) == expected
    assert not distributed.is_initialized()


def test_memory_of_strategies_adds_up() -> None:
    recipe = recipe_of(5000, BIG, 2, "bf16-mixed")
    alone = needs.memory(recipe)
    assert alone.weights == 4 * needs.parameters(recipe)
    assert alone.optimizer == pytest.approx(2 * alone.weights, 1e-3)
    assert needs.copied(alone, 1) == alone
    assert needs.copied(alone, 64).gradients == alone.weights
    assert needs.sharded(alone, *needs.shares(recipe, 64)).peak < alone.peak < needs.copied(alone, 64).peak
    begin, end, worst = needs.moments(recipe)
    assert worst == alone and begin.activations > end.activations and begin.gradients == 0 < end.gradients
    assert needs.memory(recipe, recompute=True).activations < alone.activations
    half = recipe_of(5000, BIG, 2, "bf16-true")
    assert needs.memory(half).weights == alone.weights / 2 and torch.get_default_dtype() == torch.float32
    assert needs.communication(100.0, 4) == {"ddp": 150.0, "fsdp2": 225.0}


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


DEEP = {
    "gpt": (GPT, {"n_head": 2, "n_embd": 32}, "32-true", 1),
    "gpt, wide": (GPT, {"n_head": 2, "n_embd": 128}, "bf16-mixed", 2),
    "seq2seq": (Seq2Seq, {"n_head": 2, "n_embd": 32, "start_token": 1}, "bf16-true", 8),
}


@pytest.mark.parametrize("name", often(DEEP))
def test_a_few_layers_tell_what_all_of_them_need(name: str) -> None:
    kind, size, precision, batch = DEEP[name]
    shape, make_net = (batch, 16), partial(kind, 50, 16, n_layer=7, **size)
    deep = needs.Recipe(make_net, lambda groups: AdamW(groups, fused=True), shape, shape, precision, 1, 7)
    whole = replace(deep, layers=None)
    assert deep.deep and not whole.deep
    assert needs.parameters(deep) == needs.parameters(whole) == sum(p.numel() for p in make_net().parameters())
    assert needs.flops_per_token(deep) == needs.flops_per_token(whole)
    assert needs.largest_share(deep, 3) == needs.largest_share(whole, 3)
    assert needs.at_once(deep) == needs.at_once(whole)
    for again in (False, True):
        exact, found = (needs.moments(recipe, recompute=again) for recipe in (whole, deep))
        for a, b in zip(exact[:2], found[:2], strict=True):
            assert (b.weights, b.gradients, b.optimizer) == (a.weights, a.gradients, a.optimizer)
            assert b.activations == pytest.approx(a.activations, rel=1e-3, abs=1000)
        assert max(m.peak for m in found) == pytest.approx(max(m.peak for m in exact), rel=0.03)


def test_layers_that_differ_are_counted_one_by_one() -> None:
    """The dilation of a gated WaveNet's layers doubles, so a few do not tell the rest."""
    make_net = partial(GatedWaveNet, 50, 16, n_layer=7, n_embd=8)
    assert not needs.Recipe(make_net, AdamW, (2, 16), (2, 16), layers=7).deep


@pytest.mark.parametrize("config", often(CONFIGS, distinct), ids=lambda path: str(path.relative_to(ROOT / "configs")))
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


@pytest.mark.parametrize("name", GPT2)
def test_gpt2s_sizes_are_openais(lm, data_for, name: str) -> None:
    """The recipe of 124M is nanoGPT's, without biases."""
    config = ROOT / f"configs/gpt2-{name}.yaml"
    recipe = yaml.safe_load(config.read_text())
    net, data = recipe["model"]["init_args"]["net"]["init_args"], recipe["data"]["init_args"]
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(50257, data["block_size"], **{**net, "bias": True}).parameters())
    assert count == GPT2[name] and net.get("bias", True) == (name != "124m")
    code, out, err = lm("plan", "--config", config, "--devices", 8, "--json", *data_for(recipe))
    assert code == 0 and (MISSING or net.get("bias") is False or json.loads(out)["parameters"] == count), err


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
