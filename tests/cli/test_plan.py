"""What `lm plan` says, beside what is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.optim import AdamW

from lm.models import GPT
from lm.training import planning
from tests.conftest import ROOT

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
for _ in range(3):
    recipe.forward_backward(net, tokens, tokens)
    optimizer.step()
    optimizer.zero_grad()
print(read("VmHWM") - before)
"""


def recipe_of(vocab: int, size: dict, batch: int, precision: str = "32-true") -> planning.Recipe:
    shape = (batch, 256)
    return planning.Recipe(
        lambda: GPT(vocab, 256, **size), lambda groups: AdamW(groups, fused=True), shape, shape, precision
    )


BIG = {"n_layer": 6, "n_head": 6, "n_embd": 384, "bias": False}
LLAMA = {"n_layer": 4, "n_head": 4, "n_embd": 512, "n_kv_head": 2, "norm": "rms", "positions": "rotary"}
LLAMA |= {"feed_forward": "swiglu", "tie_weights": False}
CASES = {
    "gpt": ((5000, BIG, 8), False),
    "recomputed": ((5000, BIG, 8), True),
    "llama": ((8000, LLAMA, 6), False),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_15_percent_of_what_the_process_takes(case: str) -> None:
    arguments, recompute = CASES[case]
    predicted = planning.memory(recipe_of(*arguments), recompute=recompute).peak
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
    assert planning.parameters(recipe) == sum(p.numel() for p in net.parameters())
    matrices = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 2 and name != "wpe.weight")
    attention = 2 * 2 * 2 * 256 * 16  # layers x (scores, values) x 2 x T x C
    assert planning.flops_per_token(recipe) == 3 * (2 * matrices + attention)


@pytest.mark.parametrize("processes", [2, 3, 1024])
def test_shares_are_those_of_the_largest_rank_and_nothing_is_left_behind(processes: int) -> None:
    recipe = recipe_of(100, {"n_layer": 2, "n_head": 2, "n_embd": 48}, 3)
    rows = {name: p.shape[0] for name, p in recipe.make_net().named_parameters()}
    expected = sum(p.numel() // rows[n] * -(-rows[n] // processes) for n, p in recipe.make_net().named_parameters())
    assert planning.largest_share(recipe, processes) == expected
    assert not distributed.is_initialized()


def test_memory_of_strategies_adds_up() -> None:
    recipe = recipe_of(5000, BIG, 2, "bf16-mixed")
    alone = planning.memory(recipe)
    assert alone.weights == 4 * planning.parameters(recipe)
    assert alone.optimizer == pytest.approx(2 * alone.weights, 1e-3)
    assert planning.copied(alone, 1) == alone
    assert planning.copied(alone, 64).gradients == alone.weights
    assert planning.sharded(recipe, alone, 64).peak < alone.peak < planning.copied(alone, 64).peak
    assert planning.memory(recipe, recompute=True).activations < alone.activations
    half = recipe_of(5000, BIG, 2, "bf16-true")
    assert planning.memory(half).weights == alone.weights / 2 and torch.get_default_dtype() == torch.float32
    assert planning.communication(100.0, 4) == {"ddp": 150.0, "fsdp2": 225.0}


def test_the_command(lm, workplace: Path) -> None:
    words = ("plan", "--config", "tiny.yaml", "--num_nodes", 2, "--devices", 2, "--gpu", "h100", "--json")
    code, out, err = lm(*words)
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["parameters"] == 4048 and found["strategy"] == "ddp"
    assert found["tokens_per_step"] == 64 and found["micro_batch_size"] == 1
    steps, speed, usage = 12, planning.DEVICES["H100"].flops * 1e12, 0.4
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
