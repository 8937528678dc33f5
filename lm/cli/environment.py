"""Launchers' environment variables, checked before a process waits for others because of them."""

import os

from lm.errors import UserError

COUNTS = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"),
    "JSM_NAMESPACE_SIZE",
)
NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", *COUNTS),
)


def numbers() -> dict[str, int]:
    """Return the variables that are there; to be called before Lightning's import, which reads some of them.

    Raises:
        UserError: One is not a number.
    """
    found = {name: os.environ[name] for name in NUMBERS if name in os.environ}
    for name, value in found.items():
        if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= (name in COUNTS)):
            raise UserError(f"{name} in the environment is {value[:40]!r}: a launcher sets it to a number: unset it")
    return {name: int(value) for name, value in found.items()}


def processes() -> int:
    """Return how many processes a launcher says that it has started."""
    return max([1, *(value for name, value in numbers().items() if name in ("WORLD_SIZE", "SLURM_NTASKS"))])


def check() -> None:
    """Refuse variables that give this process no place among the others.

    Raises:
        UserError: One is not a number, or some contradict each other.
    """
    found = numbers()
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if found.get(rank, 0) >= found.get(size, 1 << 31):
            raise UserError(f"{rank} in the environment is {found[rank]}, {size} {found[size]}: unset them")
    if found.get("RANK") and "WORLD_SIZE" not in found:
        raise UserError(
            f"RANK in the environment is {found['RANK']}, and there is no WORLD_SIZE: unset it, or use torchrun"
        )
    lacks = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in found]
    if "TORCHELASTIC_RUN_ID" in os.environ and lacks:  # Lightning takes it for a sign that torchrun has set them all
        absent = " or ".join(lacks)
        raise UserError(
            f"TORCHELASTIC_RUN_ID is in the environment, and there is no {absent}: unset it, or use torchrun"
        )
    alone = not {"RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"} & found.keys()
    if found.get("LOCAL_RANK") and alone:
        raise UserError(
            f"LOCAL_RANK in the environment is {found['LOCAL_RANK']}, and there is no MASTER_PORT to meet the others: "
            "unset it, or start all by torchrun"
        )
