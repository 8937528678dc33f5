"""How `lm fit` starts: what it imports, and what the garbage collector has to look through."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ONLY_OTHERS = {
    *("optuna", "sqlalchemy", "starlette", "uvicorn", "openai", "httpx", "pyarrow", "tiktoken", "gguf"),
    *("torch._inductor.codegen", "lm.serving", "lm.course", "lm.planning", "lm.corpus.prepare"),
    *("lm.experiments.page", "lm.experiments.sweep", "lm.experiments.study"),
}
"""Packages that only other commands need, or only some recipes."""

PROGRAM = """
import gc, importlib, sys
from lm.cli import main

real = importlib.import_module

def imported(name, *arguments, **more):
    module = real(name, *arguments, **more)
    if name == "lm.cli.fit":
        from lm.training.step import Step

        fit, frozen = module.fit, []

        def begin(self, done):
            print("modules", *frozen, *sorted(sys.modules))
            raise SystemExit(0)

        Step.begin = begin
        module.fit = lambda words: (frozen.append(gc.get_freeze_count()), fit(words))
    return module

importlib.import_module = imported
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_first_step_comes_soon(workplace: Path) -> None:
    """Before it, nothing is imported that it does not need, and what was imported is never searched for garbage."""
    words = [sys.executable, "-c", PROGRAM, "fit", "--config", "tiny.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    (line,) = (one for one in done.stdout.splitlines() if one.startswith("modules "))
    _, frozen, *modules = line.split()
    assert int(frozen) > 100_000
    assert {one for name in modules for one in ONLY_OTHERS if f"{name}.".startswith(f"{one}.")} == set()
