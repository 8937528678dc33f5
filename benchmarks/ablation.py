"""The lecture's fourth exercise: what each modern change to GPT gains, at equal steps and tokens.

    LM_DATA_HOME=... python benchmarks/ablation.py [--seeds 1337 …] [--jobs 2] [--folder FOLDER]

GPT-2's layout and AdamW at the shape and length of configs/shakespeare-cpu.yaml, 2,000 steps of 768 tokens of tiny
Shakespeare, with one setting changed at a time, and with several together. The loss is of the whole validation split
after the last step.
"""

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reproduce import CONFIGS, parameters, run

NET, OPTIMIZER = "--model.init_args.net.init_args", "--model.init_args.optimizer"
BASE = [  # what the recipe has changed itself
    *(f"{NET}.positions", "learned", f"{NET}.norm", "layer", f"{NET}.feed_forward", "gelu"),
    *(f"{NET}.qk_norm", "false", f"{NET}.token_shift", "false"),
    *(OPTIMIZER, "torch.optim.AdamW"),
]
MUON = [OPTIMIZER, "lm.training.optimizers.MuonAdamW", f"{OPTIMIZER}.init_args.muon_lr", 0.02]
LLAMA = [f"{NET}.positions", "rotary", f"{NET}.norm", "rms", f"{NET}.feed_forward", "swiglu"]
OWN = [*LLAMA[:-1], "relu_squared", f"{NET}.qk_norm", "true", f"{NET}.token_shift", "true"]
VARIANTS: dict[str, list[object]] = {
    "GPT-2 without biases (base)": [],
    "with biases": [f"{NET}.bias", "true"],
    "untied head": [f"{NET}.tie_weights", "false"],
    "rotary positions": [f"{NET}.positions", "rotary"],
    "RMSNorm": [f"{NET}.norm", "rms"],
    "SwiGLU": [f"{NET}.feed_forward", "swiglu"],
    "squared ReLU": [f"{NET}.feed_forward", "relu_squared"],
    "QK-norm": [f"{NET}.qk_norm", "true"],
    "2 key-value heads": [f"{NET}.n_kv_head", 2],
    "token shift": [f"{NET}.token_shift", "true"],
    "logit soft cap 15": [f"{NET}.logit_soft_cap", 15],
    "Muon": MUON,
    "rotary + RMSNorm + SwiGLU": LLAMA,
    "rotary + RMSNorm + SwiGLU + QK-norm + Muon": [*LLAMA, f"{NET}.qk_norm", "true", *MUON],
    "the recipe": [*OWN, *MUON],
}


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--jobs", type=int, default=2, help="Trainings at a time.")
    parser.add_argument("--folder", type=Path, help="Where runs are kept; a temporary folder by default.")
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    config = CONFIGS / "shakespeare-cpu.yaml"

    def train(variant: str) -> tuple[int, float]:
        losses = []
        for seed in options.seeds:
            name = f"{list(VARIANTS).index(variant)}-{seed}"
            words = ["fit", "--config", config, "--name", name, "--ckpt_path", "auto", "--seed_everything", seed]
            run(*words, *BASE, *VARIANTS[variant], folder=folder)
            path = folder / "checkpoints" / name / "last.ckpt"
            losses.append(run("validate", "--ckpt_path", path, folder=folder)["loss"])
        return parameters(path), statistics.median(losses)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        print("| changed | parameters | validation loss | against the base |\n| --- | --- | --- | --- |", flush=True)
        base = None
        for variant, (count, loss) in zip(VARIANTS, pool.map(train, VARIANTS), strict=True):
            base = loss if base is None else base
            print(f"| {variant} | {count:,} | {loss:.4f} | {loss - base:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
