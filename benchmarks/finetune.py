"""Fine-tuning against training from scratch, at equal steps on tiny Shakespeare.

    LM_DATA_HOME=... python benchmarks/finetune.py [--steps 100 300 1000]

A GPT is trained on the language reference (configs/quickstart.yaml; a line with tiny Shakespeare's symbols is added, so
that one vocabulary does for both), then fine-tuned on tiny Shakespeare with `--init_from`; the other starts there
untrained, with the same vocabulary, network and recipe.
"""

import argparse
import os
import tempfile
from pathlib import Path

from reproduce import CONFIGS, run

from lm.corpus import sources


def main() -> None:
    """Pretrain once, then run both for each number of steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, help="Steps before, in place of the recipe's.")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 1000])
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        symbols = "".join(sorted(set(sources.find("shakespeare").read())))
        (folder / "docs.txt").write_text(sources.find("python-docs").read() + "\n" + symbols)
        first = ["fit", "--config", CONFIGS / "quickstart.yaml", "--data.init_args.corpus", "docs.txt"]
        few = [] if options.first is None else ["--trainer.max_steps", options.first]
        before = run(*first, *few, "--name", "pretrained", folder=folder)
        rates = [f"--model.init_args.optimizer.init_args.{name}" for name in ("lr", "muon_lr")]
        still = ["--trainer.max_steps", 1, *(word for rate in rates for word in (rate, 0))]  # the vocabulary, untrained
        run(*first, "--name", "untrained", *still, folder=folder)
        print(f"pretrained on python-docs: {before['step']} steps, validation loss {before['val_loss']:.4f}\n")
        print("| steps on tiny Shakespeare | from scratch | fine-tuned | difference |\n| --- | --- | --- | --- |")
        for steps in options.steps:
            losses = {}
            for start in ("untrained", "pretrained"):
                words = ["fit", "--config", CONFIGS / "shakespeare-cpu.yaml", "--name", f"{start}-{steps}"]
                words += ["--trainer.max_steps", steps, "--data.init_args.tokenizer", "inherit"]
                words += ["--init_from", f"checkpoints/{start}/last.ckpt"]
                losses[start] = run(*words, folder=folder)["val_loss"]
            scratch, tuned = losses["untrained"], losses["pretrained"]
            print(f"| {steps} | {scratch:.4f} | {tuned:.4f} | {tuned - scratch:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
