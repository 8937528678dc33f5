"""Where a network runs: of a checkpoint, by --device; of a recipe, by trainer.accelerator."""

from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import ArgumentParser

from lm.cli.messages import shortened
from lm.errors import UserError
from lm.generation.packed import Dtype


def add_options(parser: ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, mps, or auto: the fastest there is.")
    parser.add_argument(
        "--dtype",
        type=Dtype,
        default="float32",
        help="Of the weights; smaller ones are read faster where the CPU has the instructions: see lm doctor.",
    )


def device(name: str) -> torch.device:
    """Return a device by name, checked to be there.

    Raises:
        UserError: It is not, or it does not work.
    """
    there = dict.fromkeys(("auto", "cpu"), torch.device("cpu"))
    if torch.accelerator.is_available() and (fastest := torch.accelerator.current_accelerator()):
        there |= {"auto": fastest, fastest.type: fastest}
        there |= {f"{fastest.type}:{i}": torch.device(fastest.type, i) for i in range(torch.accelerator.device_count())}
    if name not in there:
        raise UserError(f"--device {shortened(name, 60)}: there is none here: say {' or '.join(there)}")
    try:
        torch.zeros(1, device=there[name]).item()
    except RuntimeError as error:  # a GPU that is full, or broken
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return there[name]


def of_recipe(trainer: Mapping[str, Any]) -> torch.device:
    """Return where a recipe trains, given its Trainer's arguments."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if there is None or trainer["accelerator"] == "cpu" else there


def processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes share a recipe's batch, given its Trainer's arguments."""
    devices = trainer["devices"]
    if str(devices) in ("auto", "-1"):
        return int(trainer["num_nodes"]) * (1 if of_recipe(trainer).type == "cpu" else torch.accelerator.device_count())
    named = devices if isinstance(devices, list) else str(devices).strip(",").split(",")  # 2, "2", "0,1", [0, 1]
    return int(trainer["num_nodes"]) * (len(named) if len(named) > 1 or isinstance(devices, list) else int(named[0]))
