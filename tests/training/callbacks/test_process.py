"""Callbacks whose effect is on the process itself."""

import gc
import platform
import subprocess
import sys
import weakref
from typing import Any

import pytest

from lm.training.callbacks import process

FAULTS = """
import resource, sys, torch
from lm.training.callbacks.process import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
def step():
    held = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each, touched
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back at once")
def test_kept_memory_is_not_asked_for_again() -> None:
    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100
    # where a small block happens to lie above the large ones, glibc cannot give them back
    assert any(faults("give") > 1000 for _ in range(8))


class Circle:
    """An object that holds itself."""


def test_the_collector_leaves_alone_what_was_there_until_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "gc", gc)  # not the quick one of tests/conftest.py
    none: Any = None
    heap = process.FrozenHeap()
    for end in (
        lambda: heap.teardown(none, none, "fit"),
        lambda: heap.on_exception(none, none, KeyboardInterrupt()),
    ):
        circle: Any = Circle()
        circle.own = circle
        gone = weakref.ref(circle)
        circle = None
        heap.on_train_start(none, none)
        assert gone() is None, "what nobody held is gone first"
        assert gc.get_freeze_count() > 10_000
        end()
        assert gc.get_freeze_count() == 0
