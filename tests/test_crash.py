"""A sample of benchmarks/crash.py: calls to the disk that fail, or are a process's last, and power cuts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def traces() -> bool:
    """Return whether a process may be traced here."""
    return bool(shutil.which("strace")) and not subprocess.run(["strace", "-qo", os.devnull, "true"]).returncode


FITS = ("save", "save, sharded", "resume")  # of thousands of calls
OTHERS = ("prepare", "tokenizer", "export", "import")
CASES = [(command, "997", pytest.mark.slow) for command in FITS] + [(one, "17", pytest.mark.slow) for one in OTHERS]
CASES += [(command, "97", pytest.mark.long) for command in FITS] + [(one, "5", pytest.mark.long) for one in OTHERS]


@pytest.mark.skipif(not traces(), reason="needs strace, and the right to trace")
@pytest.mark.parametrize(("command", "every"), [pytest.param(*case, marks=mark) for *case, mark in CASES])
def test_every_call_to_the_disk_may_fail(command: str, every: str) -> None:
    words = [sys.executable, "benchmarks/crash.py", "--only", f"^{command}$", "--every", every]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    tried = [int(count) for count in re.findall(r"of (\d+)", done.stdout)]
    assert len(tried) == 6 and sum(tried) >= 3, done.stdout
