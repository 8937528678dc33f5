"""How many problems a network solves that learned + - * /, with its steps written out and without.

    python benchmarks/calculator.py [--seeds 1 2 3] [--part 1.0] [--folder FOLDER]

Trains configs/tasks/calculator.yaml twice a seed, by `lm fit` with one thread, and asks each network all problems that
were held out for testing, by `lm solve`. --part is a share of the steps, to see it run; FOLDER keeps the runs, and goes
on with them. Prints medians over the seeds, by operator and by the digits of the longer operand.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import yaml
from reproduce import CONFIGS, run

RECIPE = CONFIGS / "tasks/calculator.yaml"
WAYS = {"with steps": [], "without": ["--data.init_args.written_steps", "false", "--data.init_args.block_size", 11]}


def solved(folder: Path, seed: int, way: str, part: float) -> dict[str, float]:
    """Train a network; return its share of right answers by kind of problem, and the minutes that it took."""
    steps = max(8, int(yaml.safe_load(RECIPE.read_text())["trainer"]["max_steps"] * part))
    name = f"{way.replace(' ', '-')}-{seed}"
    words = ["fit", "--config", RECIPE, "--name", name, "--seed_everything", seed, *WAYS[way], "--ckpt_path", "auto"]
    few = ["--trainer.max_steps", steps, "--trainer.val_check_interval", max(1, steps // 10)]
    seconds = run(*words, *few, folder=folder)["seconds"]
    found = run("solve", "--ckpt_path", f"checkpoints/{name}/last.ckpt", "--split", "test", folder=folder)
    kinds = {one["kind"]: one["right"] / one["problems"] for one in found["kinds"]}
    return {**kinds, "all": found["right_result"], "minutes": seconds / 60}


def main() -> None:
    """Train and ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--part", type=float, default=1.0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        every = {way: [solved(folder, seed, way, options.part) for seed in options.seeds] for way in WAYS}
    print(f"| problems | {' | '.join(WAYS)} |\n|{' --- |' * (1 + len(WAYS))}")
    for kind in every["without"][0]:
        values = [median(one[kind] for one in found) for found in every.values()]
        print(f"| {kind} | {' | '.join(f'{x:.1f}' if kind == 'minutes' else f'{x:.2%}' for x in values)} |")


if __name__ == "__main__":
    main()
