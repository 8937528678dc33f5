"""Whether memory stays flat in a long training run: the process's resident memory every 1,000 steps.

Usage: LM_DATA_HOME=... python benchmarks/memory.py [--config configs/bigram.yaml] [--steps 10000]

Everything is on, as in `lm fit`: logging, evaluation, samples, checkpoints.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Resident(Callback):
    """Notes the resident memory in MiB, from Linux's /proc, by step."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note every 1,000 steps."""
        if trainer.global_step % 1000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found[trainer.global_step] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Train in an empty folder."""
    from lm.cli.fit import Fit
    from lm.cli.parsing import quiet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/bigram.yaml"))
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    config = options.config.resolve()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cli = Fit(["--config", str(config), "--json", "--trainer.max_steps", str(options.steps)], "")
        resident = Resident()
        cli.trainer.callbacks.insert(0, resident)
        cli.run()
    print("\n| resident memory | here |\n| --- | --- |")
    for step, mebibytes in resident.found.items():
        print(f"| at step {step:,} | {mebibytes:.0f} MiB |")


if __name__ == "__main__":
    main()
