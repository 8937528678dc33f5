"""What a sweep costs beyond the training of its trials: python benchmarks/sweep.py [--trials N] [--steps N].

Each trial's training time is what `lm fit` itself says in its last line: from the first step to the last checkpoint.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RATE = "model.init_args.optimizer.init_args.lr"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    recipe = yaml.safe_load((ROOT / "configs/bigram.yaml").read_text())
    recipe["trainer"] |= {"max_steps": options.steps}
    recipe["data"]["init_args"] |= {"corpus": str(ROOT / "README.md")}
    found = {"recipe": "recipe.yaml", "settings": {RATE: {"low": 1e-3, "high": 1.0, "log": True}}}
    with tempfile.TemporaryDirectory() as place:
        for name, values in (("recipe", recipe), ("sweep", found | {"trials": options.trials})):
            Path(place, f"{name}.yaml").write_text(yaml.safe_dump(values))
        words = [sys.executable, "-m", "lm", "sweep", "--config", "sweep.yaml"]
        began = time.monotonic()
        environment = {**os.environ, "LM_LOG": "json"}  # its last line then has the seconds
        subprocess.run(words, cwd=place, check=True, stdout=subprocess.DEVNULL, env=environment)
        whole = time.monotonic() - began
        trained = 0.0
        for log in Path(place, "sweeps/sweep/recipes").glob("*.log"):
            trained += sum(map(float, re.findall(r'"seconds": ([\d.]+).*"message": "done: ', log.read_text())))
        single = []
        for number in range(3):
            began = time.monotonic()
            alone = [sys.executable, "-m", "lm", "fit", "--config", "recipe.yaml", "--name", f"alone-{number}"]
            subprocess.run(alone, cwd=place, check=True, stdout=subprocess.DEVNULL)
            single.append(time.monotonic() - began)
    print("| sweep | seconds | sweep / this |\n| --- | --- | --- |")
    print(f"| `lm sweep` of {options.trials} trials | {whole:.1f} | |")
    print(f"| training times of its trials, summed | {trained:.1f} | {whole / trained:.2f} |")
    apart = options.trials * sorted(single)[1]
    print(f"| `lm fit` as often | {apart:.1f} | {whole / apart:.2f} |")


if __name__ == "__main__":
    main()
