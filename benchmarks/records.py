"""How good a small network gets, and how fast: the table of docs/records.md.

    LM_DATA_HOME=... python benchmarks/records.py [--only TEXT …] [--seeds 1337 1338 1339] [--nanogpt FOLDER]

Each recipe is trained by `lm fit`, one process at a time on all cores; losses are of the whole validation split, in
windows that do not overlap. With a clone of nanoGPT in FOLDER, its train.py trains its own CPU recipe just before each
run of shakespeare-cpu, both with as many threads, and times are also told as shares of its: of the whole process, and
until the loss that nanoGPT reports, 1.886, stands in metrics.csv.
"""

import argparse
import csv
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
NANOGPT_LOSS = 1.886
RECIPES = ("quickstart", "shakespeare-cpu", "names/record")
NANOGPT = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]  # its README's, for a CPU


class Result(NamedTuple):
    """A run: its loss, the seconds of its process, those until it was as good as nanoGPT, and nanoGPT's."""

    loss: float
    seconds: float
    until: float | None = None
    peer: float | None = None


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


def losses(table: Path) -> list[float]:
    """Return the validation losses of a run so far."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]


def fit(recipe: str, seed: int, folder: Path) -> Result:
    """Train a recipe from its start."""
    name = f"{Path(recipe).name}-{seed}"
    words: list[Any] = ["fit", "--config", CONFIGS / f"{recipe}.yaml", "--name", name, "--seed_everything", seed]
    began, until = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, "-m", "lm", *map(str, words), "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while process.poll() is None:
        time.sleep(0.05)
        if until is None and min(losses(folder / "logs" / name / "metrics.csv"), default=9.0) <= NANOGPT_LOSS:
            until = time.monotonic() - began
    seconds = time.monotonic() - began
    assert process.stdout is not None
    result = json.loads(process.stdout.read().splitlines()[-1])
    return Result(result["val_loss"], seconds, until)


def row(recipe: str, found: list[Result]) -> str:
    """Return a row of the table."""

    def middle(values: list[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return format(statistics.median(known), form) if known else "–"

    shakespeare = recipe == "shakespeare-cpu"
    whole = [one.seconds / one.peer if one.peer else None for one in found]
    until = [one.until / one.peer if one.peer and one.until and shakespeare else None for one in found]
    cells = [
        recipe,
        f"{statistics.mean(one.loss for one in found):.4f}",
        " ".join(f"{one.loss:.4f}" for one in found),
        middle([one.seconds for one in found], ".0f"),
        middle(whole, ".2f"),
        middle(until, ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train each recipe with each seed, and print a row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=RECIPES, help="Recipes, by their names in configs/.")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1337, 1338, 1339])
    parser.add_argument("--nanogpt", type=Path, help="A clone of nanoGPT.")
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    print("| recipe | validation loss | by seed | seconds | / nanoGPT's | until 1.886 / nanoGPT's |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for recipe in options.only:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in options.seeds:
                peer = nanogpt(options.nanogpt.resolve()) if options.nanogpt and recipe == "shakespeare-cpu" else None
                found.append(fit(recipe, seed, Path(folder))._replace(peer=peer))
        print(row(recipe, found), flush=True)


if __name__ == "__main__":
    main()
