"""What starts without what: a command that needs no training waits for no Lightning, preparation for no torch."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

WITHOUT = {
    "lightning": ("lm.generation", "lm.checkpoints.safetensors", "lm.cli.sample", "lm.cli.export"),
    "torch": ("lm.corpus.prepare", "lm.corpus.token_cache", "lm.corpus.tokenizer_training", "lm.cli.prepare"),
}


@pytest.mark.parametrize("package", WITHOUT)
def test_starts_without(package: str) -> None:
    code = f"import sys, {', '.join(WITHOUT[package])}; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
