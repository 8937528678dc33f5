"""Activations: in generation, a text's bits do not depend on how many others there are."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lm.models.feed_forward import activated


@pytest.mark.parametrize("f", [partial(F.gelu, approximate="tanh"), F.gelu, F.silu])
@pytest.mark.parametrize("width", [101, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_as_if_alone(f: Any, width: int, dtype: torch.dtype) -> None:
    """Also for three threads, whose shares of the elements end amid vectors."""
    x = 2 * torch.randn(23, 1, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.no_grad():
            whole, alone = activated(f, x), torch.cat([f(row[None]) for row in x])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)


def test_training_computes_all_at_once() -> None:
    calls: list[int] = []
    activated(lambda x: calls.append(len(x)) or x, torch.ones(8, 1, 101))
    assert calls == [8]
