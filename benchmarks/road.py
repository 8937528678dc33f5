"""The whole road from documents to an assistant, a command a stage, and what each prints: a page's transcript.

    python benchmarks/road.py [--max_steps N]

--max_steps cuts each stage, to see it run. The transcript has of each stage the network it begins with, its last
evaluation and its last step, without what depends on the machine alone: speeds, seconds and paths.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INHERIT = "--data.init_args.tokenizer inherit"
REWARD = "--model.init_args.reward"
ASKED = r"printf 'Write a name.\n/new\n%.0s' 1 2 3 4 5"
STAGES = (
    "lm fit --config configs/posttraining/pretrain.yaml",
    "lm fit --config configs/posttraining/names.yaml --init_from checkpoints/pretrain/last.ckpt",
    f"lm fit --config configs/posttraining/reward.yaml --init_from checkpoints/names/last.ckpt {INHERIT}",
    f"lm fit --config configs/posttraining/ppo.yaml --init_from checkpoints/names/last.ckpt {INHERIT} "
    f"{REWARD}=lm.posttraining.rewards.LearnedReward {REWARD}.init_args.ckpt_path checkpoints/reward/last.ckpt",
    *(f"{ASKED} | lm chat --ckpt_path checkpoints/{name}/last.ckpt" for name in ("names", "ppo")),
)


def transcript(run: Callable[[str], str]) -> Iterator[str]:
    """Run the stages; yield the lines of the transcript.

    Args:
        run: Runs a command, and returns what it prints.
    """
    for command in STAGES:
        yield f"$ {command}"
        yield from said(run(command))


def in_shell(command: str, folder: Path, max_steps: int | None = None) -> str:
    """Run a command in a shell, whose `lm` is this one; return what it prints."""
    few = f" --trainer.max_steps {max_steps} --trainer.val_check_interval {max_steps}" if max_steps else ""
    line = re.sub(r"\blm (?=fit|chat)", f"{sys.executable} -m lm ", command) + few * ("lm fit" in command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.splitlines()[-1]}")
    return done.stdout


def said(text: str) -> list[str]:
    """Return what a transcript keeps of a command's output."""
    lines = text.splitlines()
    if not any(line.startswith("done: ") for line in lines):
        return lines
    evaluations = [line for line in lines if "val_loss" in line]
    steps = [line for line in lines if re.match(r"step +\d+/\d+  (?!val_loss)", line)]
    steps = [re.sub(r"  [\d,]+ (tokens|pairs)/s", "", line) for line in steps]
    return [lines[0], *steps[-1:], *evaluations[-1:]]


def main() -> None:
    """Print the transcript."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = list(transcript(lambda command: in_shell(command, Path(folder), options.max_steps)))
    print("```console", *lines, "```", sep="\n")


if __name__ == "__main__":
    main()
