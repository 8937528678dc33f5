"""What only a GPU can show; `python benchmarks/gpu/all.py --parts tests` runs these alone."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm import models
from lm.backprop import Gradients
from lm.checkpoints.background import BackgroundWriter
from lm.data import LinesData
from lm.generation import Sampler, generate
from lm.models import GPT
from lm.planning import needs
from lm.training.by_hand import StepByHand
from lm.training.optimizers import parameter_groups
from tests.support.networks import LINES, NETWORKS, recipe
from tests.support.runs import assert_equal, state, stop_with

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = ("--trainer.accelerator", "cuda", "--trainer.devices", 1)
FUSED = ("--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.fused", "true")


def network(name: str) -> nn.Module:
    """Return a network in float64, whose dropout, which a GPU draws otherwise, is off."""
    torch.manual_seed(1)
    arguments = {key: value for key, value in NETWORKS[name][0].items() if key != "dropout"}
    net: nn.Module = getattr(models, name.split()[0])(27, 8, **arguments)
    return net.double()


def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Return tokens and targets that a network takes."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(27, (16, 8), generator=draw)
    tokens[:, 3] = 1  # where Seq2Seq's target starts
    targets = torch.randint(27, net(tokens).shape[:-1], generator=draw)
    return tokens, targets


def by_autograd(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss = F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten())
    loss.backward()
    return {"loss": loss.detach().cpu(), **gradients(net)}


def by_hand(net: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    step = StepByHand(net, list(net.parameters()), Gradients())
    step.begin()
    loss = step.add(tokens, targets, last=True)
    step.finish()
    return {"loss": loss.cpu(), **gradients(net)}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("find", [by_autograd, by_hand])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_equals_the_cpus(name: str, find: partial[dict[str, Tensor]]) -> None:
    net = network(name)
    tokens, targets = batch(net)
    there = copy.deepcopy(net).cuda()
    wanted, found = by_autograd(net, tokens, targets), find(there, tokens.cuda(), targets.cuda())
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-11, msg=key)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[object, ...]]:
    """Options by which a GPU adds in the same order every time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield "--trainer.deterministic", "true"
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("module", "precision"),
    [
        ("LanguageModel", "32-true"),
        ("LanguageModel", "bf16-mixed"),
        ("LanguageModel", "16-mixed"),
        ("ManualLanguageModel", "32-true"),
        ("ManualLanguageModel", "bf16-mixed"),
    ],
)
def test_stopping_and_resuming_changes_no_bit(lm, workplace: Path, deterministic, module: str, precision: str) -> None:
    words = ("fit", "--config", "tiny.yaml", "--model", f"lm.training.{module}", "--trainer.precision", precision)
    words = (*words, *CUDA, *FUSED, *deterministic)
    code, _, err = lm(*words, "--name", "whole")
    assert code == 0, err
    code, _, err = lm(*words, "--name", "parts", *stop_with("StopAt", 7))
    assert code == 143, err
    code, _, err = lm(*words, "--name", "parts", "--ckpt_path", "last")
    assert code == 0, err
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))


@pytest.mark.parametrize("module", ["LanguageModel", "ManualLanguageModel"])
def test_a_step_that_is_not_logged_waits_for_nothing(lm, workplace: Path, module: str) -> None:
    words = ("--trainer.max_steps", 20, "--trainer.val_check_interval", 20, "--trainer.log_every_n_steps", 20)
    recipe("GPT")
    words = ("fit", "--config", "net.yaml", "--model", f"lm.training.{module}", *CUDA, *FUSED, *words)
    hasty = ("--trainer.callbacks+", "tests.support.stop.WaitForNothing")
    code, _, err = lm(*words, "--checkpoint.every_n_steps", 100, "--figures.every_n_steps", 0, *hasty)
    assert code == 0, err


@pytest.mark.parametrize("name", ["GPT", "GPT today", "GatedWaveNet", "Seq2Seq", "MLP"])
def test_a_seed_gives_the_cpus_text(name: str) -> None:
    net = network(name).eval()

    def text(net: nn.Module, device: str) -> list[list[int]]:
        prompt = torch.tensor([[1, 5], [1, 7]], device=device)
        made = generate(net, prompt, sampler=Sampler(), generator=torch.Generator().manual_seed(3))
        return [next(made).tolist() for _ in range(12)]

    assert text(net, "cpu") == text(copy.deepcopy(net).cuda(), "cuda")


def test_copies_between_gpu_and_cpu_are_pinned(workplace: Path) -> None:
    weight = torch.randn(1000, 1000, device="cuda")
    copied = BackgroundWriter().snapshot({"weight": weight})["weight"]
    assert copied.is_pinned() and torch.equal(copied, weight.cpu())
    recipe("MLP")
    data = LinesData(**LINES["init_args"])
    data.setup("fit")
    assert all(one.is_pinned() for one in next(iter(data.train_dataloader())))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_is_what_lm_plan_says(precision: str) -> None:
    def make(n_layer: int = 4) -> GPT:
        return GPT(4096, 256, n_layer=n_layer, n_head=4, n_embd=256)

    optimizer_of = partial(torch.optim.AdamW, fused=True)
    plan = needs.memory(needs.Recipe(make, optimizer_of, (16, 256), (16, 256), precision)).peak
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    net = make().cuda()
    optimizer = optimizer_of(parameter_groups(net))
    tokens, targets = torch.randint(4096, (2, 16, 256), device="cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = torch.cuda.max_memory_allocated() - before
    assert 0.6 < found / plan < 1.4, f"{found / 1e6:.0f} MB, planned {plan / 1e6:.0f} MB"
