"""What is predicted of a training run, beside what is measured."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.optim import AdamW

from lm.models import GPT, GatedWaveNet, Seq2Seq
from lm.planning import needs
from tests.conftest import ROOT
from tests.support.cases import often
from tests.support.plans import BIG, CASES, recipe_of

MEASURE = """
import json, sys, torch
from torch.nn import functional as F
from lm.models import GPT
from lm.training.compute import recompute_blocks
from tests.support.plans import CASES, recipe_of
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
