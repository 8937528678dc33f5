"""The device that an option names."""

import torch

from lm.cli.messages import shortened
from lm.errors import UserError


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
