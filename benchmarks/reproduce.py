"""Reproduce the published figures: train each recipe, evaluate it, print the table.

    LM_DATA_HOME=... python benchmarks/reproduce.py [--only TEXT …] [--jobs 2] [--folder FOLDER]

Each recipe is trained by `lm fit`, in a process of its own with one thread, and evaluated by `lm validate`. A row is
met where the loss of the whole validation split is at most the published one plus the tolerance. FOLDER keeps the runs:
called again, it continues what was interrupted and only evaluates what is finished.
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
    """A published figure."""

    config: str
    published: float
    tolerance: float = 0.0


ROWS = [
    Row("names/mlp", 2.105, 0.01),
    Row("names/mlp-by-hand", 2.1099, 0.01),
    Row("names/mlp-context8", 2.027, 0.01),
    Row("names/wavenet-per-position", 2.029, 0.01),
    Row("names/wavenet", 2.022, 0.01),
    Row("names/wavenet-large", 1.993, 0.01),
    Row("names/record", 1.96),
    Row("bigram", 2.5, 0.03),
    Row("ladder/one-head", 2.4, 0.03),
    Row("ladder/four-heads", 2.28, 0.03),
    Row("ladder/feed-forward", 2.24, 0.03),
    Row("ladder/blocks", 2.08, 0.03),
    Row("ladder/layernorm", 2.06, 0.03),
    Row("shakespeare-cpu", 1.88),
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
    """Train a recipe and evaluate its best and its last checkpoint; the better on validation counts."""
    name = row.config.replace("/", "-")
    run("fit", "--config", CONFIGS / f"{row.config}.yaml", "--name", name, "--ckpt_path", "auto", folder=folder)
    runs = folder / "checkpoints" / name
    found = {p.name: run("validate", "--ckpt_path", p, folder=folder) for p in (runs / "last.ckpt", runs / "best.ckpt")}
    kind = min(found, key=lambda key: found[key]["loss"])
    splits = {
        split: run("validate", "--ckpt_path", runs / kind, "--split", split, folder=folder) for split in ("train",)
    }
    if row.config.startswith("names"):
        splits["test"] = run("validate", "--ckpt_path", runs / kind, "--split", "test", folder=folder)
    return {"parameters": parameters(runs / kind), "val": found[kind]["loss"], "step": found[kind]["step"]} | {
        split: result["loss"] for split, result in splits.items()
    }


def parameters(path: Path) -> int:
    """Return the number of parameters in a checkpoint: tied ones once, no buffers."""
    from lm.inference import load

    return sum(p.numel() for p in load(path).net.parameters())


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
        print("| recipe | parameters | published | train | validation | test | met |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for row, result in zip(rows, results, strict=True):
            test = f"{result['test']:.4f}" if "test" in result else "–"
            met = "yes" if result["val"] <= row.published + row.tolerance else "NO"
            print(
                f"| {row.config} | {result['parameters']:,} | {row.published} | {result['train']:.4f} | "
                f"{result['val']:.4f} | {test} | {met} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
