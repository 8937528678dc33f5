"""The validation loss of a network whose weights are kept in fewer bits, as `lm sample --dtype` keeps them.

    python benchmarks/dtypes.py [--config configs/quickstart.yaml] [--ckpt_path PATH] [--steps N]

Without a checkpoint, the recipe is trained first.
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import torch
from reproduce import CONFIGS, run
from torch.nn.functional import cross_entropy

from lm.checkpoints.restore import Fitted, load_network
from lm.data import TextData
from lm.generation.packed import Dtype, packed


@torch.inference_mode()
def validation_loss(fitted: Fitted, dtype: Dtype) -> float:
    """Return the loss over the whole validation split, in nats per token."""
    data = TextData(**{name: value for name, value in fitted.data["init_args"].items() if name != "tokenizer"})
    data.tokenizer = fitted.tokenizer
    data.setup("validate")
    net, batches = packed(fitted.net, dtype), data.eval_dataset("val")
    total = count = 0.0
    for tokens, targets in (batches[k] for k in range(len(batches))):
        loss = cross_entropy(net(tokens).float().flatten(0, 1), targets.flatten(), reduction="sum")
        total, count = total + float(loss), count + float((targets >= 0).sum())
    return total / count


def main() -> None:
    """Train where there is no checkpoint, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "quickstart.yaml")
    parser.add_argument("--ckpt_path", type=Path)
    parser.add_argument("--steps", type=int, help="Of the training, for a first look.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.ckpt_path
        if path is None:
            few = [] if options.steps is None else ["--trainer.max_steps", options.steps]
            run("fit", "--config", options.config.resolve(), *few, folder=Path(folder))
            path = Path(folder) / "checkpoints" / options.config.stem / "best.ckpt"
        losses = {dtype: validation_loss(load_network(path), dtype) for dtype in get_args(Dtype)}
    print("| weights | validation loss | against float32 |\n| --- | --- | --- |")
    for dtype, loss in losses.items():
        print(f"| {dtype} | {loss:.4f} | {loss - losses['float32']:+.4f} |")


if __name__ == "__main__":
    main()
