"""What the Trainer costs: `lm fit` with everything on, against a bare PyTorch loop that does the same steps.

    LM_DATA_HOME=... python benchmarks/overhead.py [--config configs/shakespeare-cpu.yaml] [--steps 2000] [--rounds 3]

Both train the recipe's network on the same batches, with the same optimizer, schedule and clipping, and evaluate the
whole validation split at the same steps; the Trainer also logs to TensorBoard, metrics.csv and the console, samples
text, and writes checkpoints. They take turns, each in a process of its own; the time is that of training, without
imports. Equal validation losses, to the last bit, show that the work was the same. Further words go to `lm fit`,
such as `--model lm.training.ManualLanguageModel`, with which losses are equal up to rounding.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import yaml


def instantiate(kind: type, spec: dict[str, Any], **more: Any) -> Any:
    """Return an object from its class_path and init_args."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(kind, "it")
    spec = {"class_path": spec["class_path"], "init_args": {**spec.get("init_args", {}), **more}}
    return parser.instantiate(parser.parse_object({"it": spec})).it


def optimizer_of(settings: dict[str, Any], net: Any) -> Any:
    """Return the recipe's optimizer, over the same groups of parameters."""
    from importlib import import_module

    from lm.training.optimizers import parameter_groups

    module, name = settings["optimizer"]["class_path"].rsplit(".", 1)
    arguments = dict(settings["optimizer"]["init_args"])
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return getattr(import_module(module), name)(parameter_groups(net), **arguments)


def batches(data: Any, steps: int) -> Any:
    """Yield each step's batch, from stacks of so many as the recipe's module takes at a time."""
    dataset = data.train_dataset(steps)
    for k in count():
        item = dataset[k]
        yield from zip(*item, strict=True) if steps > 1 else [item]


def take(net: Any, optimizer: Any, tokens: Any, targets: Any, *, clip_norm: float | None) -> None:
    """Take a plain step."""
    from torch import nn
    from torch.nn import functional as F

    loss = F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    optimizer.step()


def bare(recipe: dict[str, Any], steps: int) -> dict[str, float]:
    """Train in a plain loop; return its seconds and last validation loss."""
    import torch
    from lightning.pytorch import LightningDataModule
    from torch import nn
    from torch.nn import functional as F

    from lm.models.layers import calibrate
    from lm.training.schedules import Schedule

    torch.manual_seed(recipe["seed_everything"])
    settings = recipe["model"]["init_args"]
    data = instantiate(LightningDataModule, recipe["data"], seed=recipe["seed_everything"])
    data.setup("fit")
    net = instantiate(nn.Module, settings["net"], vocab_size=data.vocab_size, block_size=data.block_size)
    optimizer = optimizer_of(settings, net)
    rates, schedule = [group["lr"] for group in optimizer.param_groups], instantiate(Schedule, settings["schedule"])
    every = recipe["trainer"]["val_check_interval"]
    began = time.monotonic()
    training = batches(data, settings.get("steps_per_call", 1))
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, steps)
        take(net, optimizer, *next(training), clip_norm=settings["clip_norm"])
        if settings.get("calibrate") and step + 1 == steps:
            dataset = data.eval_dataset("train")
            calibrate(net, (dataset[k][0] for k in range(len(dataset))))
        if (step + 1) % every == 0 or step + 1 == steps:
            net.eval()
            nats, targets_seen = torch.zeros((), dtype=torch.float64), 0
            with torch.inference_mode():
                for tokens, targets in data.val_dataloader():
                    nats += F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten(), reduction="sum")
                    targets_seen += targets.numel()
            val_loss = float(nats / targets_seen)
            net.train()
    return {"seconds": time.monotonic() - began, "val_loss": val_loss}


def trainer(config: Path, steps: int, more: list[str]) -> dict[str, float]:
    """Train with `lm fit` in an empty folder; return its seconds and last validation loss."""
    from lm.cli.fit import Fit
    from lm.cli.parsing import quiet

    quiet()
    cli = Fit(["--config", str(config), "--trainer.max_steps", str(steps), *more], "")
    return cli.run()


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/shakespeare-cpu.yaml"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=("bare", "trainer"))
    options, more = parser.parse_known_args()
    config = options.config.resolve()
    recipe = yaml.safe_load(config.read_text())
    if recipe["trainer"].get("precision", "32-true") != "32-true":
        parser.error(f"{config.name} has trainer.precision {recipe['trainer']['precision']}: the bare loop has 32 bits")
    if options.worker:
        result = bare(recipe, options.steps) if options.worker == "bare" else trainer(config, options.steps, more)
        print(json.dumps({"seconds": result["seconds"], "val_loss": result["val_loss"]}))
        return
    times: dict[str, list[float]] = {"bare": [], "trainer": []}
    losses = set()
    env = dict(os.environ)
    if home := env.get("LM_DATA_HOME"):
        env["LM_DATA_HOME"] = str(Path(home).resolve())
    for number in range(options.rounds):
        for kind, found in times.items():
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, __file__, "--worker", kind, "--config", str(config)]
                words += ["--steps", str(options.steps), *more]
                text = subprocess.run(words, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
            result = json.loads(text.splitlines()[-1])
            found.append(result["seconds"])
            losses.add(result["val_loss"])
            print(
                f"round {number + 1}: {kind:<8} {result['seconds']:7.2f} s  val_loss {result['val_loss']:.4f}",
                flush=True,
            )
    ratios = [b / a for a, b in zip(times["bare"], times["trainer"], strict=True)]
    print(f"\n{options.steps} steps of {config.name}, {options.rounds} rounds, medians")
    for kind, found in times.items():
        median = statistics.median(found)
        print(f"{kind:<8} {median:7.2f} s  {1000 * median / options.steps:7.3f} ms/step")
    print(f"validation losses {'equal to the last bit' if len(losses) == 1 else f'differ: {sorted(losses)}'}\n")
    name = f"{options.config.with_suffix('').as_posix().removeprefix('configs/')}, {options.steps:,} steps"
    if any("Manual" in word for word in more):
        name += f", by hand{', compiled' * ('--model.init_args.compile' in more)}, against autograd in the loop"
    print("| Trainer / bare loop | here | rounds |\n| --- | --- | --- |")
    print(f"| {name} | {statistics.median(ratios):.3f} | {', '.join(f'{ratio:.3f}' for ratio in ratios)} |")


if __name__ == "__main__":
    main()
