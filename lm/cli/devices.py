"""Where a checkpoint's network runs, and in which numbers: the options, and the device that one names."""

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
