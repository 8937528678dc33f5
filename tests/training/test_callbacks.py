"""Callbacks whose effect is on the process itself."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from lm.training.callbacks import keep_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back at once")
def test_kept_memory_is_not_asked_for_again() -> None:
    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100
    # where a small block happens to lie above the large ones, glibc cannot give them back
    assert any(faults("give") > 1000 for _ in range(8))
