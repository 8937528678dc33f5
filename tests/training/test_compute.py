"""Compiled, recomputed, in other precisions: the same network, the same checkpoints."""

import gc
from pathlib import Path

import pytest
import torch

from lm.backprop import Gradients, run
from lm.checkpoints import checkpoint
from lm.models import GPT
from lm.training.loggers.log_files import read_csv
from tests.support.ranks import MODULES, numbers
from tests.support.runs import assert_equal, state

LOSSES = ("train/loss", "val/loss")
EXACT = ("--trainer.precision", "64-true")


@pytest.mark.parametrize("module", MODULES)
def test_recomputed_activations_give_the_same_bits_dropout_included(lm, workplace: Path, module: str) -> None:
    common = ("fit", "--config", "tiny.yaml", "--model", f"lm.training.{module}")
    for name, words in {"kept": (), "recomputed": ("--model.init_args.activation_checkpointing", "true")}.items():
        assert lm(*common, "--name", name, *words)[0] == 0
    kept, recomputed = (state(Path(f"checkpoints/{name}/last.ckpt")) for name in ("kept", "recomputed"))
    assert_equal(kept["state_dict"], recomputed["state_dict"])


def test_recomputing_needs_less_memory() -> None:
    from lm.training.compute import recompute_blocks

    def kept(recomputed: bool) -> int:
        torch.manual_seed(0)
        net, sizes = GPT(16, 64, n_layer=4, n_head=2, n_embd=32), []
        if recomputed:
            recompute_blocks(net)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            net(torch.zeros(2, 64, dtype=torch.long)).sum()
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def storages() -> dict[int, int]:
    """Return the sizes of all tensors' storages, in bytes."""
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@torch.no_grad()
def test_recomputing_by_hand_needs_less_memory() -> None:
    torch.manual_seed(0)
    net, tokens, sizes = GPT(16, 64, n_layer=4, n_head=2, n_embd=32), torch.zeros(2, 64, dtype=torch.long), {}
    for kept in (True, False):
        grads = Gradients()
        grads.recomputed = () if kept else {*net.h}
        before = storages()
        x, backward = run(net, grads, tokens)
        sizes[kept] = sum(size for place, size in storages().items() if place not in before)
        backward(x)  # until here it has held them
    assert sizes[False] < sizes[True] / 4


MANUAL = ("--config", "tiny.yaml", "--model", "lm.training.ManualLanguageModel", "--model.init_args.compile", "true")


@pytest.mark.parametrize("words", [MANUAL, ("--config", "tiny.yaml", "--model.init_args.net", "lm.models.Bigram")])
def test_what_cannot_be_recomputed_is_refused(lm, workplace: Path, words: tuple[str, ...]) -> None:
    code, _, err = lm("fit", *words, "--model.init_args.activation_checkpointing", "true")
    assert code == 2 and "model.activation_checkpointing" in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_compiled_and_plain_runs_share_checkpoints(lm, workplace: Path) -> None:
    net = ("--model.init_args.net.init_args.dropout", 0, *EXACT)
    compiled = ("--model.init_args.compile", "true")
    assert lm("fit", "--config", "tiny.yaml", "--name", "plain", *net)[0] == 0
    assert lm("fit", "--config", "tiny.yaml", "--name", "compiled", *net, *compiled)[0] == 0
    assert numbers("compiled") == pytest.approx(numbers("plain"), rel=1e-10)
    plain, fast = (checkpoint.load(Path(f"checkpoints/{name}/last.ckpt")) for name in ("plain", "compiled"))
    assert plain["state_dict"].keys() == fast["state_dict"].keys()
    step = ("--ckpt_path", "checkpoints/plain/step=0000005.ckpt")
    assert lm("fit", "--config", "tiny.yaml", "--name", "mixed", *net, *compiled, *step)[0] == 0
    assert numbers("mixed")[-1] == pytest.approx(numbers("plain")[-1], rel=1e-10)


@pytest.mark.parametrize("module", MODULES)
def test_without_a_compiler_the_run_goes_on(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    from torch._inductor import config

    monkeypatch.delenv("CXX", raising=False)
    words = ("--model", f"lm.training.{module}", "--model.init_args.compile", "true")
    missing = r"model.compile: .*no-such-compiler.* is missing here: going on"
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.warns(UserWarning, match=missing) as found:
        assert lm("fit", "--config", "tiny.yaml", *words)[0] == 0
    assert sum("model.compile" in str(one.message) for one in found) == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_resumes_to_the_last_bit(lm, workplace: Path, precision: str) -> None:
    recipe = ("fit", "--config", "tiny.yaml", "--trainer.precision", precision)
    assert lm(*recipe, "--name", "whole")[0] == 0
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "checkpoints/whole/step=0000005.ckpt")[0] == 0
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert checkpoint.load(Path("checkpoints/whole/last.ckpt"))["state_dict"]["net.wte.weight"].dtype == dtype
    losses = [row[key] for row in read_csv(Path("logs/whole/metrics.csv"))[1] for key in LOSSES if row.get(key)]
    assert all(float(torch.tensor(float(one)).bfloat16()) != float(one) for one in losses)  # not rounded to 8 bits


SCALED = (
    "--trainer.plugins",
    "{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: 16-mixed, device: cpu, "
    "scaler: {class_path: torch.amp.GradScaler, init_args: {device: cpu, init_scale: 1024.0, growth_interval: 2}}}}",
)


def test_the_loss_scaler_resumes_to_the_last_bit(lm, workplace: Path) -> None:
    """torch's loss scaler for CPUs stands in for the one for GPUs: same code, same state."""
    assert lm("fit", "--config", "tiny.yaml", "--name", "whole", *SCALED)[0] == 0
    middle = ("--ckpt_path", "checkpoints/whole/step=0000005.ckpt")
    assert lm("fit", "--config", "tiny.yaml", "--name", "parts", *SCALED, *middle)[0] == 0
    whole, parts = (state(Path(f"checkpoints/{name}/last.ckpt")) for name in ("whole", "parts"))
    assert whole["MixedPrecision"]["scale"] == 1024.0 * 2**6
    assert_equal(whole, parts)


@pytest.mark.parametrize("fused", ["false", "true"])
def test_clipping_is_of_gradients_without_the_scale(lm, workplace: Path, fused: str) -> None:
    """Lightning leaves the scale to fused optimizers, and would clip what is still scaled."""
    optimizer = ("--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", 0.1)
    words = (*optimizer, "--model.init_args.optimizer.fused", fused, "--model.init_args.clip_norm", 0.05)
    words += ("--model.init_args.net.init_args.dropout", 0)
    for scale in ("1.0", "1024.0"):
        scaled = (SCALED[0], SCALED[1].replace("1024.0", scale).replace("growth_interval: 2", "growth_interval: 1000"))
        assert lm("fit", "--config", "tiny.yaml", "--name", scale, *words, *scaled)[0] == 0
    assert numbers("1024.0") == pytest.approx(numbers("1.0"), rel=2e-2)  # of 16-bit activations


def test_an_overflow_is_the_scalers_to_skip(lm, workplace: Path) -> None:
    scaled = (SCALED[0], SCALED[1].replace("1024.0", "1.0e+12").replace("growth_interval: 2", "growth_interval: 1000"))
    assert lm("fit", "--config", "tiny.yaml", "--name", "whole", *scaled, "--trainer.max_steps", 40)[0] == 0
    whole = checkpoint.load(Path("checkpoints/whole/last.ckpt"))
    assert whole["MixedPrecision"]["scale"] < 1e12 and whole["lm"]["guard"]["skipped"] == 0
    taken = whole["optimizer_states"][0]["state"][0]["step"]
    assert 0 < taken < 40  # steps that overflowed left the weights alone
    middle = ("--ckpt_path", "checkpoints/whole/step=0000005.ckpt", "--trainer.max_steps", 40)
    assert lm("fit", "--config", "tiny.yaml", "--name", "parts", *scaled, *middle)[0] == 0
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))


def test_half_precision_on_a_cpu_is_refused(lm, workplace: Path) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", "--trainer.precision", "16-mixed")
    assert code == 2 and err.startswith("error: trainer.precision 16-mixed") and "bf16-mixed" in err
    assert len(err.splitlines()) == 1
