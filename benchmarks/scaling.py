"""What several processes, saving and resuming cost, side by side.

    python benchmarks/scaling.py             two ranks x one thread / one rank x two threads, tokens per second
    python benchmarks/scaling.py --saving    the longest step around a save / the median step, GPT-2 small's state;
                                             seconds from the start of a resumed process to the end of its first step
    python benchmarks/scaling.py --loader    the share of the time that training waits for data

Both sides of a ratio are measured in turn, in one run; medians over rounds. Needs tiny Shakespeare, and for --saving
GPT-2's merge table, in LM_DATA_HOME.
"""

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler

ROOT = Path(__file__).resolve().parent.parent


class StepTimes(Callback):
    """Writes the time from each step's end to the next one's, and the moment of the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the moment when training begins."""
        self.began = time.time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the moment down."""
        self.ends.append(time.time())
        Path("steps.txt").write_text(" ".join(map(str, [self.began, *self.ends])))


class LoaderShare(SimpleProfiler):
    """Writes the share of the time between the first and the last batch that training waited for one."""

    def summary(self) -> str:
        """Write it down; there is nothing to print."""
        waits = self.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"][1:]
        steps = self.recorded_durations["run_training_batch"][1:]
        Path("share.txt").write_text(str(sum(waits) / (sum(waits) + sum(steps))))
        return ""


def fit(folder: str, config: str, threads: int, *words: object) -> None:
    command = [sys.executable, "-m", "lm", "fit", "--config", str(ROOT / "configs" / config), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def throughput(module: str, ranks: int, threads: int) -> float:
    """Return the median tokens per second of shakespeare-cpu's shape, without evaluations, samples and figures."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("--trainer.limit_val_batches", 0, "--samples.max_new_tokens", 0, "--figures.every_n_steps", 0)
        steps = ("--trainer.max_steps", 400, "--checkpoint.every_n_steps", 10_000, "--name", "run")
        fit(folder, "shakespeare-cpu.yaml", threads, "--model", module, "--trainer.devices", ranks, *quiet, *steps)
        with (Path(folder) / "logs/run/metrics.csv").open() as stream:
            rows = [float(row["train/tokens_per_second"]) for row in csv.DictReader(stream)]
        return statistics.median(rows[2:])


def print_row(what: str, figure: str, rounds: Iterable[str] = ("–",)) -> None:
    print(f"| {what} | {figure} | {', '.join(rounds)} |", flush=True)


def scaling(rounds: int) -> None:
    what = "two ranks × one thread / one rank × two threads, same global batch, tokens per second"
    for name, module in (
        (what, "lm.training.LanguageModel"),
        ("the same with gradients by hand", "lm.training.ManualLanguageModel"),
    ):
        ratios = [throughput(module, 2, 1) / throughput(module, 1, 2) for _ in range(rounds)]
        print_row(name, f"{statistics.median(ratios):.2f}", (f"{ratio:.3f}" for ratio in ratios))


def saving() -> None:
    with tempfile.TemporaryDirectory() as folder:
        small = ("--data.init_args.batch_size", 1, "--trainer.accumulate_grad_batches", 1, "--name", "run")
        cheap = ("--trainer.precision", "32-true", "--trainer.limit_val_batches", 0, "--figures.every_n_steps", 0)
        words = (*small, *cheap, "--trainer.callbacks+", "benchmarks.scaling.StepTimes", "--samples.max_new_tokens", 0)
        fit(folder, "gpt2-124m.yaml", 2, *words, "--trainer.max_steps", 26, "--checkpoint.every_n_steps", 8)
        _, *ends = [float(one) for one in (Path(folder) / "steps.txt").read_text().split()]
        took = [after - before for before, after in itertools.pairwise(ends)]  # took[k]: step k + 2
        median, longest = statistics.median(took), max(took[8:])  # the first save also allocates its memory
        print("seconds of steps: " + " ".join(f"{one:.2f}" for one in took), file=sys.stderr)
        what = "GPT-2 small, a save every 8 steps: longest step after the first save / median step"
        print_row(what, f"{longest / median:.2f}")
        began = time.time()
        fit(folder, "gpt2-124m.yaml", 2, *words, "--trainer.max_steps", 27, "--ckpt_path", "last")
        begin, end = [float(one) - began for one in (Path(folder) / "steps.txt").read_text().split()[:2]]
        what = "GPT-2 small, resumed: seconds from the start of the process to the beginning and end of its first step"
        print_row(what, f"{begin:.1f}, {end:.1f}")


def loader(rounds: int) -> None:
    for config in ("shakespeare-cpu.yaml", "names/mlp.yaml"):
        shares = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                steps = ("--trainer.max_steps", 1000, "--name", "run", "--checkpoint.every_n_steps", 1000)
                fit(folder, config, 2, *steps, "--trainer.profiler", "benchmarks.scaling.LoaderShare")
                shares.append(float((Path(folder) / "share.txt").read_text()))
        what = f"share of the time that training waits for data, {config.removesuffix('.yaml')}"
        print_row(what, f"{statistics.median(shares):.2%}", (f"{share:.2%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saving", action="store_true")
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    print("| what | here | rounds |\n| --- | --- | --- |", flush=True)
    if options.saving:
        saving()
    elif options.loader:
        loader(options.rounds)
    else:
        scaling(options.rounds)


if __name__ == "__main__":
    main()
