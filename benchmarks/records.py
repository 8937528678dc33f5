"""How good a small network gets, and how fast: the table of docs/records.md.

    LM_DATA_HOME=... python benchmarks/records.py [--only ROW ROW] [--seeds 1337 1338 1339] [--nanogpt FOLDER]

Each recipe is trained by `lm fit`, one process at a time on all cores; losses are of the whole validation split, in
windows that do not overlap. With a clone of nanoGPT in FOLDER, its train.py trains its own CPU recipe before the runs
of each seed, with as many threads, and times of whole processes are also told as shares of its. All but the names are
trained by gradients by hand, in bfloat16. The row of 220 steps ends below the loss that nanoGPT
reports, 1.88, at higher rates and a shorter warm-up, which lm sweep found.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BY_HAND: list[Any] = ["--model", "lm.training.ManualLanguageModel", "--trainer.precision", "bf16-mixed"]
SHORT = [
    *("--trainer.max_steps", 220, "--trainer.val_check_interval", 220),
    *("--model.init_args.schedule.init_args.warmup_steps", 10),
    *("--model.init_args.optimizer.init_args.lr", 0.03, "--model.init_args.optimizer.init_args.muon_lr", 0.015),
]  # rates by lm sweep --config configs/sweeps/shakespeare-seconds.yaml
RECIPES: dict[str, list[Any]] = {
    "quickstart": BY_HAND,
    "shakespeare-cpu": BY_HAND,
    "shakespeare-cpu, 220 steps": [*BY_HAND, *SHORT],
    "shakespeare-15-minutes": BY_HAND,
    "names/record": [],
}
NANOGPT = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]  # its README's, for a CPU


class Result(NamedTuple):
    """A run: its loss, and the seconds of its process."""

    loss: float
    seconds: float


def nanogpt(clone: Path) -> float:
    """Return the seconds of nanoGPT's own training."""
    data = clone / "data/shakespeare_char"
    if not (data / "train.bin").exists():
        (data / "input.txt").write_bytes((Path(os.environ["LM_DATA_HOME"]) / "tinyshakespeare.txt").read_bytes())
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    words = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT]
    subprocess.run(words, cwd=clone, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def fit(case: str, seed: int, folder: Path) -> Result:
    """Train a recipe from its start."""
    recipe = case.split(",")[0]
    words = ["fit", "--config", CONFIGS / f"{recipe}.yaml", "--seed_everything", seed, *RECIPES[case]]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lm", *map(str, words), "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return Result(json.loads(done.stdout.splitlines()[-1])["val_loss"], time.monotonic() - began)


def row(case: str, found: list[Result], peers: list[float]) -> str:
    """Return a row of the table; peers are nanoGPT's seconds, seed by seed, or none."""
    shares = [one.seconds / peer for one, peer in zip(found, peers, strict=True)] if peers else []
    cells = [
        case,
        f"{statistics.mean(one.loss for one in found):.4f}",
        " ".join(f"{one.loss:.4f}" for one in found),
        f"{statistics.median(one.seconds for one in found):.0f}",
        f"{statistics.median(shares):.2f}" if shares else "–",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train each recipe with each seed, and print a row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*RECIPES], choices=RECIPES, metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--nanogpt", type=Path, help="A clone of nanoGPT.")
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    found: dict[str, list[Result]] = {case: [] for case in options.only}
    compared = {case for case in found if case.startswith("shakespeare-cpu")}
    peers: list[float] = []
    for seed in options.seeds:
        if options.nanogpt and compared:
            peers.append(nanogpt(options.nanogpt.resolve()))
        for case, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(fit(case, seed, Path(folder)))
            print(row(case, runs, peers if case in compared else []), file=sys.stderr, flush=True)
    print("| recipe | validation loss | by seed | seconds | / nanoGPT's |\n| --- | --- | --- | --- | --- |")
    for case, runs in found.items():
        print(row(case, runs, peers if case in compared else []))


if __name__ == "__main__":
    main()
