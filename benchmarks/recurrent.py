"""Our recurrent networks beside the same ones made of torch's own modules: each recipe trained both ways.

    LM_DATA_HOME=... python benchmarks/recurrent.py [--only rnn gru lstm] [--folder FOLDER] [--steps N]

The second network of a pair differs in its class alone; its initial weights are other draws from the same
distributions. Losses are of the whole validation split, after the last step. FOLDER keeps the runs: called again, it
continues what was interrupted.
"""

import argparse
import os
import tempfile
from pathlib import Path

import yaml
from reproduce import CONFIGS, parameters, run

TORCHS = {"rnn": "TorchRNN", "gru": "TorchGRU", "lstm": "TorchLSTM"}


def trained(name: str, folder: Path, net: str | None, more: list[str]) -> tuple[float, float, Path]:
    """Train a recipe; return its validation loss, its minutes, and its last checkpoint.

    Args:
        name: Of the recipe, in configs/names.
        folder: Where the run is.
        net: The class of another network with the same settings; None for the recipe's own.
        more: Further words for `lm fit`.
    """
    recipe = yaml.safe_load((CONFIGS / f"names/{name}.yaml").read_text())
    if net is not None:
        recipe["model"]["init_args"]["net"]["class_path"] = net
    called = name if net is None else f"{name}-torch"
    config = folder / f"{called}.yaml"
    config.write_text(yaml.safe_dump(recipe))
    fit = run("fit", "--config", config, "--ckpt_path", "auto", *more, folder=folder)
    path = folder / f"checkpoints/{called}/last.ckpt"
    loss = run("validate", "--ckpt_path", path, folder=folder)["loss"]
    return loss, fit["seconds"] / 60, path


def main() -> None:
    """Train, and print a row for each recipe as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*TORCHS, "bag-of-words"], help="Recipes of configs/names.")
    parser.add_argument("--folder", type=Path, help="Where runs are kept; a temporary folder by default.")
    parser.add_argument("--steps", type=int, help="Of each run, for a first look.")
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    more = ["--trainer.max_steps", str(options.steps)] if options.steps else []
    print("| recipe | parameters | validation | with torch's module | difference | minutes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            ours, minutes, path = trained(name, folder, None, more)
            cells = ["–", "–"]
            if name in TORCHS:
                theirs, *_ = trained(name, folder, f"benchmarks.recurrent_of_torch.{TORCHS[name]}", more)
                cells = [f"{theirs:.4f}", f"{ours - theirs:+.4f}"]
            print(
                f"| names/{name} | {parameters(path):,} | {ours:.4f} | {' | '.join(cells)} | {minutes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
