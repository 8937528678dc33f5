"""Compiled, recomputed, in other precisions: the same network, the same checkpoints."""

from pathlib import Path

import pytest
import torch

from lm.training import checkpoint
from tests.training.test_ranks import numbers
from tests.training.test_resume import assert_equal, state

EXACT = ("--trainer.precision", "64-true")


def test_recomputed_activations_give_the_same_bits_dropout_included(lm, workplace: Path) -> None:
    for name, words in {"kept": (), "recomputed": ("--model.init_args.activation_checkpointing", "true")}.items():
        assert lm("fit", "--config", "tiny.yaml", "--name", name, *words)[0] == 0
    kept, recomputed = (state(Path(f"checkpoints/{name}/last.ckpt")) for name in ("kept", "recomputed"))
    assert_equal(kept["state_dict"], recomputed["state_dict"])


def test_recomputing_needs_less_memory() -> None:
    from lm.models import GPT
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


@pytest.mark.parametrize("words", [("--config", "tiny.yaml", "--model", "lm.training.ManualLanguageModel")])
def test_what_cannot_be_recomputed_is_refused(lm, workplace: Path, words: tuple[str, ...]) -> None:
    code, _, err = lm("fit", *words, "--model.init_args.activation_checkpointing", "true")
    assert code == 2 and err.startswith("error: model.activation_checkpointing") and len(err.splitlines()) == 1


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


def test_without_a_compiler_the_run_goes_on(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.training.language_model.compiler_missing", lambda device: "a C++ compiler (g++)")
    with pytest.warns(UserWarning, match=r"model.compile: a C\+\+ compiler \(g\+\+\) is missing here"):
        assert lm("fit", "--config", "tiny.yaml", "--model.init_args.compile", "true")[0] == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_resumes_to_the_last_bit(lm, workplace: Path, precision: str) -> None:
    recipe = ("fit", "--config", "tiny.yaml", "--trainer.precision", precision)
    assert lm(*recipe, "--name", "whole")[0] == 0
    assert lm(*recipe, "--name", "parts", "--ckpt_path", "checkpoints/whole/step=0000005.ckpt")[0] == 0
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert checkpoint.load(Path("checkpoints/whole/last.ckpt"))["state_dict"]["net.wte.weight"].dtype == dtype


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


def test_half_precision_on_a_cpu_is_refused(lm, workplace: Path) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", "--trainer.precision", "16-mixed")
    assert code == 2 and err.startswith("error: trainer.precision 16-mixed") and "bf16-mixed" in err
    assert len(err.splitlines()) == 1
