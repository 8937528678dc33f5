"""How long `lm fit` takes to its first step, beside the imports alone: python benchmarks/startup.py [--rounds 5].

Each round starts new processes, in turns; a figure is the median. Where transformers is installed, torchmetrics imports
it, which takes a few tenths of a second of each start.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from reproduce import CONFIGS

FIT = ["-m", "lm", "fit", "--config", str(CONFIGS / "quickstart.yaml"), "--trainer.max_steps", "1000000"]
WHAT = {
    "import torch": (["-c", "import torch; print('there')"], "there"),
    "import lightning.pytorch": (["-c", "import lightning.pytorch; print('there')"], "there"),
    "lm fit: the first line": (FIT, "training to step"),
    "lm fit: the first step": (FIT, '"step": 1, '),
}


def seconds(words: list[str], said: str, folder: str) -> float:
    """Return the time from the start of a process until it prints a line with such words."""
    began = time.monotonic()
    environment = {**os.environ, "LM_LOG": "json"}  # the first step's line, too
    with subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = any(said in line for line in process.stdout)
        took = time.monotonic() - began
        process.kill()
    if not found:
        raise SystemExit(f"{' '.join(words)} ended without {said}")
    return took


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in WHAT}
    with tempfile.TemporaryDirectory() as folder:
        seconds(*WHAT["lm fit: the first step"], folder)  # the corpus is prepared, the disk warm
        for _ in range(options.rounds):
            for name, (words, said) in WHAT.items():
                found[name].append(seconds(words, said, folder))
    print("| from the start of the process | seconds | rounds |\n| --- | --- | --- |")
    for name, took in found.items():
        print(f"| {name} | {statistics.median(took):.1f} | {min(took):.1f} to {max(took):.1f} |")


if __name__ == "__main__":
    main()
