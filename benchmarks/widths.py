"""Whether the best rate stays put over the widths of configs/scaling, and how well small ones predict the next.

python benchmarks/widths.py [--steps N] [--widths 64 128 256 512] [--rates 0.004 0.008 …] [--plain]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lm.experiments import power_law

ROOT = Path(__file__).parents[1]
RATES = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
OPTIMIZER = "model.init_args.optimizer.init_args.lr"


def sweep(width: int, rates: list[float], steps: int, *, plain: bool, place: Path) -> list[Any]:
    """Return [parameters, loss] of each rate at a width, by `lm sweep` over a grid."""
    recipe = yaml.safe_load((ROOT / f"configs/scaling/width-{width}.yaml").read_text())
    recipe["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
    recipe["checkpoint"]["every_n_steps"] = steps
    arguments = recipe["model"]["init_args"]
    arguments["schedule"]["init_args"]["warmup_steps"] = min(50, steps // 4)
    if plain:
        arguments["net"]["init_args"]["base_width"] = None
        arguments["optimizer"]["class_path"] = "torch.optim.AdamW"
    name = f"width-{width}{'-plain' * plain}"
    (place / f"{name}-recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {"recipe": f"{name}-recipe.yaml", "settings": {OPTIMIZER: rates}, "sampler": "grid", "trials": len(rates)}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(found))
    words = [sys.executable, "-m", "lm", "sweep", "--config", f"{name}.yaml", "--json"]
    subprocess.run(words, cwd=place, check=True, stdout=subprocess.DEVNULL)
    results = []
    for i in range(len(rates)):
        run = place / "sweeps" / name / "logs" / f"trial-{i:04d}"
        rows = (run / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("val/loss")
        losses = [float(cell) for row in rows[1:] if (cell := row.split(",")[column])]
        results.append((json.loads((run / "run.json").read_text())["parameters"], losses[-1]))
    return results


def main() -> None:
    """Print a table: a row a width, a column a rate; then the prediction of the largest width from the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--plain", action="store_true", help="without base_width, by AdamW")
    options = parser.parse_args()
    print("| width | " + " | ".join(f"lr {rate:g}" for rate in options.rates) + " | best |")
    print("| --- " * (len(options.rates) + 2) + "|")
    best = []
    with tempfile.TemporaryDirectory() as place:
        for width in options.widths:
            rows = sweep(width, options.rates, options.steps, plain=options.plain, place=Path(place))
            losses = [loss for _, loss in rows]
            best.append(min(rows, key=lambda row: row[1]))
            cells = " | ".join(f"{loss:.3f}" for loss in losses)
            print(f"| {width} | {cells} | {options.rates[losses.index(min(losses))]:g} |", flush=True)
    if len(best) > 3:
        law = power_law.fit([[size] for size, _ in best[:-1]], [loss for _, loss in best[:-1]])
        said, real = law.at([best[-1][0]]), best[-1][1]
        print(
            f"predicted of width {options.widths[-1]}: {said:.4f}; measured: {real:.4f}; off by {said / real - 1:+.2%}"
        )


if __name__ == "__main__":
    main()
