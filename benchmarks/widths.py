"""Whether the best rate stays put over the widths of a recipe, and how well small ones predict the next.

python benchmarks/widths.py [--steps N] [--widths 64 128 256 512] [--rates 0.004 0.008 …] [--kind scaled|muon|plain]

Rates are those of ScaledAdamW, of Muon, or of AdamW without base_width. What is predicted of a width is said by the law
of the best losses of those before it, where there are three.
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
    """Print a row for each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="multiples of 32")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--kind", choices=("scaled", "muon", "plain"), default="scaled", help="whose rates, see above")
    options = parser.parse_args()
    print(f"| width | {' | '.join(f'{rate:g}' for rate in options.rates)} | best | predicted | off by |")
    print("| --- " * (len(options.rates) + 4) + "|")
    best: list[Any] = []
    with tempfile.TemporaryDirectory() as place:
        for width in options.widths:
            rows = sweep(width, options.rates, options.steps, kind=options.kind, place=Path(place))
            losses = [loss for _, loss in rows]
            size, real = min(rows, key=lambda row: row[1])
            said = ["–", "–"]
            if len(best) > 2:
                law = power_law.fit([[size] for size, _ in best], [loss for _, loss in best]).at([size])
                said = [f"{law:.3f}", f"{law / real - 1:+.1%}"]
            best.append((size, real))
            cells = [str(width), *(f"{loss:.3f}" for loss in losses), f"{options.rates[losses.index(real)]:g}", *said]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
