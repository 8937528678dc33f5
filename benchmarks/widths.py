"""Whether the best rate stays put over the widths of a recipe, and how well small ones predict the next.

python benchmarks/widths.py [--steps N] [--widths 64 128 256 512] [--rates 0.004 0.008 …] [--muon | --plain]
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
OPTIMIZER = "model.init_args.optimizer.init_args"


def sweep(width: int, rates: list[float], steps: int, *, kind: str, place: Path) -> list[Any]:
    """Return [parameters, loss] of each rate at a width, by `lm sweep` over a grid."""
    recipe = yaml.safe_load((ROOT / "configs/scaling/width-64.yaml").read_text())
    recipe["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
    recipe["checkpoint"]["every_n_steps"] = steps
    arguments = recipe["model"]["init_args"]
    arguments["schedule"]["init_args"]["warmup_steps"] = min(50, steps // 4)
    arguments["net"]["init_args"] |= {"n_embd": width, "n_head": width // 32}
    rate = "lr"
    if kind == "plain":
        arguments["net"]["init_args"]["base_width"] = None
        arguments["optimizer"]["class_path"] = "torch.optim.AdamW"
    elif kind == "muon":
        arguments["optimizer"]["class_path"] = "lm.training.optimizers.MuonAdamW"
        rate = "muon_lr"
    name = f"width-{width}-{kind}"
    (place / f"{name}-recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {
        "recipe": f"{name}-recipe.yaml",
        "settings": {f"{OPTIMIZER}.{rate}": rates},
        "sampler": "grid",
        "trials": len(rates),
    }
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
    """Print a table: a row a width, a column a rate; then what smaller widths predict of each that has three such."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="multiples of 32")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--muon", dest="kind", action="store_const", const="muon", help="rates of Muon")
    kinds.add_argument("--plain", dest="kind", action="store_const", const="plain", help="AdamW without base_width")
    options = parser.parse_args()
    print("| width | " + " | ".join(f"{rate:g}" for rate in options.rates) + " | best |")
    print("| --- " * (len(options.rates) + 2) + "|")
    best = []
    with tempfile.TemporaryDirectory() as place:
        for width in options.widths:
            rows = sweep(width, options.rates, options.steps, kind=options.kind or "scaled", place=Path(place))
            losses = [loss for _, loss in rows]
            best.append(min(rows, key=lambda row: row[1]))
            cells = " | ".join(f"{loss:.3f}" for loss in losses)
            print(f"| {width} | {cells} | {options.rates[losses.index(min(losses))]:g} |", flush=True)
    if len(best) > 3:
        print("\n| width | predicted from those before it | measured | off by |\n| --- | --- | --- | --- |")
    for i in range(3, len(best)):
        law = power_law.fit([[size] for size, _ in best[:i]], [loss for _, loss in best[:i]])
        said, real = law.at([best[i][0]]), best[i][1]
        print(f"| {options.widths[i]} | {said:.4f} | {real:.4f} | {said / real - 1:+.2%} |")


if __name__ == "__main__":
    main()
