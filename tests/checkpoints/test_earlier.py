"""What earlier code wrote is read to the bit, and training goes on from it: see tests/fixtures.

Losses that follow are compared up to rounding: another processor's matrix products differ in their last bits.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.checkpoints import checkpoint
from lm.checkpoints.schema import Saved
from lm.training.loggers.log_files import read_csv
from tests.conftest import ROOT

EARLIER = ROOT / "tests/fixtures"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
KINDS = {
    "single": (["--trainer.precision", "64-true"], 1e-12),
    "sharded": (["--trainer.precision", "32-true", "--trainer.strategy", "fsdp2"], 1e-5),
}


def sums(value: Any, where: str = "") -> dict[str, str]:
    """Return the SHA-256 of each tensor in nested values, by its place."""
    if isinstance(value, torch.Tensor):
        return {where: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {place: one for key, inner in items for place, one in sums(inner, f"{where}/{key}").items()}


@pytest.fixture
def earlier(workplace: Path) -> Path:
    shutil.copytree(EARLIER / "corpus", workplace / "corpus")
    shutil.copy(EARLIER / "recipe.yaml", workplace)
    return workplace


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_to_the_bit_and_training_goes_on(lm, earlier: Path, kind: str) -> None:
    words, tolerance = KINDS[kind]
    source, run = EARLIER / kind / "last.ckpt", earlier / "checkpoints" / kind / "last.ckpt"
    run.parent.mkdir(parents=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, run)
    saved = checkpoint.load(run)
    expected = EXPECTED[kind]
    assert sums({key: saved[key] for key in ("state_dict", "optimizer_states")}) == expected["sha256"]
    resume = ["--ckpt_path", "last", "--trainer.max_steps", 8]
    resume += ["--model.init_args.net.init_args.dropout", 0]  # whose masks are other ones since
    code, _, err = lm("fit", "--config", "recipe.yaml", "--name", kind, *resume, *words)
    assert code == 0, err
    rows = [row for row in read_csv(earlier / "logs" / kind / "metrics.csv")[1] if int(row["step"]) > 4]
    losses = [float(row["train/loss_step"]) for row in rows if row["train/loss_step"]]
    assert losses == pytest.approx(expected["loss"], rel=tolerance)
    assert float(rows[-1]["val/loss"]) == pytest.approx(expected["val_loss"], rel=tolerance)


def test_an_export_is_imported(lm, earlier: Path) -> None:
    code, _, err = lm("import", "--source", EARLIER / "exported", "--output", "back.ckpt")
    assert code == 0, err
    weights = Saved.of(checkpoint.load(earlier / "back.ckpt")).weights
    original = load_file(EARLIER / "exported/model.safetensors")
    assert original.keys() <= weights.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)


def test_a_checkpoint_writes_the_same_text(lm, earlier: Path) -> None:
    words = ("--max_new_tokens", 40, "--temperature", 0)  # how a seed draws may change
    code, out, err = lm("sample", "--ckpt_path", EARLIER / "single/last.ckpt", *words)
    assert code == 0, err
    assert out == EXPECTED["text"]
