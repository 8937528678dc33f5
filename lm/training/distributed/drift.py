"""Weights that have drifted apart between the ranks, found by checksums."""

import torch
from torch import Tensor, distributed

from lm.errors import CheckError, setting


def check_drift(net: torch.nn.Module, step: int) -> None:
    """Compare checksums of all parameters over the ranks.

    Args:
        net: The network; parameters sharded over the ranks are not compared.
        step: Number of finished steps, for the message.

    Raises:
        CheckError: They differ; says on which ranks, and at which parameter first.
    """
    whole = {n: p for n, p in net.named_parameters() if not isinstance(p, distributed.tensor.DTensor)}
    if not whole:
        return
    sums = torch.stack([weight_sum(parameter.detach()) for parameter in whole.values()])  # (parameters,)
    rows = torch.stack(_gather(sums))  # (ranks, parameters)
    usual = rows.mode(dim=0).values  # (parameters,)
    if (rows == usual).all():
        return
    ranks = [str(rank) for rank, row in enumerate(rows) if not torch.equal(row, usual)]
    first = list(whole)[int((rows != usual).any(dim=0).nonzero()[0])]
    raise CheckError(
        f"step {step}: the weights of rank {', '.join(ranks)} differ from the other ranks', first at {first}: nothing "
        f"was saved since; look for a broken device, and continue with {setting('ckpt_path')} auto"
    )


def weight_sum(values: Tensor) -> Tensor:
    """Return a number, int64 (), that changes with any bit of values and with their order."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values.contiguous().flatten().view(kinds[values.element_size()]).long()  # (n,)
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()  # odd factors lose no bit; wraps


def _gather(sums: Tensor) -> list[Tensor]:
    rows = [torch.empty_like(sums) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, sums)
    return rows
