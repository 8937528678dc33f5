"""Reproduce the published figures: train each recipe, evaluate it, print the table.

    LM_DATA_HOME=... python benchmarks/reproduce.py [--only TEXT …] [--jobs 2] [--folder FOLDER]

Each recipe is trained by `lm fit`, in a process of its own with one thread, and evaluated by `lm validate`. A row is
met where the loss of the whole validation split is at most the published one plus the tolerance, or its share of fully
right answers at least the bar. Which of a run's checkpoints counts, the last or the best, is chosen on validation.
FOLDER keeps the runs: called again, it continues what was interrupted and only evaluates what is finished.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Row(NamedTuple):
    """A published figure, or the bar that was set; losses, in nats, may exceed it by the tolerance."""

    config: str
    published: float
    tolerance: float = 0.0
    metric: str = "loss"


ROWS = [
    Row("names/mlp", 2.105, 0.01),
    Row("names/mlp-by-hand", 2.1099, 0.01),
    Row("names/mlp-context8", 2.027, 0.01),
    Row("names/wavenet-per-position", 2.029, 0.01),
    Row("names/wavenet", 2.022, 0.01),
    Row("names/wavenet-large", 1.993, 0.01),
    Row("names/gated-wavenet", 1.983),
    Row("names/record", 1.96),
    Row("bigram", 2.5, 0.03),
    Row("ladder/one-head", 2.4, 0.03),
    Row("ladder/four-heads", 2.28, 0.03),
    Row("ladder/feed-forward", 2.24, 0.03),
    Row("ladder/blocks", 2.08, 0.03),
    Row("ladder/layernorm", 2.06, 0.03),
    Row("shakespeare-cpu", 1.88),
    Row("tasks/addition", 0.999, metric="exact_match"),
    Row("tasks/reverse", 0.99, metric="exact_match"),
]


def run(*words: object, folder: Path) -> dict[str, Any]:
    """Run `lm` in a folder; return what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "lm", *map(str, words), "--json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"lm {' '.join(map(str, words))}: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def reproduce(row: Row, folder: Path) -> dict[str, Any]:
    """Train a recipe and evaluate the better of its last and best checkpoint, chosen on validation."""
    name = row.config.replace("/", "-")
    fit = run("fit", "--config", CONFIGS / f"{row.config}.yaml", "--name", name, "--ckpt_path", "auto", folder=folder)
    runs = folder / "checkpoints" / name
    found = {p: run("validate", "--ckpt_path", p, folder=folder) for p in (runs / "last.ckpt", runs / "best.ckpt")}
    path = min(found, key=lambda p: found[p]["loss"])
    result = {"parameters": parameters(path), "minutes": fit["seconds"] / 60, "val": found[path][row.metric]}
    for split in ("train", "test") if row.config.startswith(("names", "tasks")) else ("train",):
        result[split] = run("validate", "--ckpt_path", path, "--split", split, folder=folder)[row.metric]
    return result


def parameters(path: Path) -> int:
    """Return the number of parameters in a checkpoint: tied ones once, no buffers."""
    from lm.generation import load_network

    return sum(p.numel() for p in load_network(path).net.parameters())


def main() -> None:
    """Run the rows and print them as they come, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="Recipes whose name contains one of these.")
    parser.add_argument("--jobs", type=int, default=2, help="Recipes trained at a time.")
    parser.add_argument("--folder", type=Path, help="Where runs are kept; a temporary folder by default.")
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    rows = [row for row in ROWS if any(text in row.config for text in options.only)]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        results = pool.map(lambda row: reproduce(row, folder), rows)
        print("| recipe | parameters | published | train | validation | test | minutes | met |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for row, result in zip(rows, results, strict=True):
            met = result["val"] <= row.published + row.tolerance
            if row.metric != "loss":
                met = result["val"] >= row.published
            figures = [f"{result[split]:.4f}" if split in result else "–" for split in ("train", "val", "test")]
            cells = [row.config, f"{result['parameters']:,}", str(row.published), *figures, f"{result['minutes']:.1f}"]
            print(f"| {' | '.join(cells)} | {'yes' if met else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
