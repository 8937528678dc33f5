"""Dropout's masks: their shares, their scale, and the random numbers that they take."""

import pytest
import torch

from lm.models.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_elements_are_dropped_with_their_probability_and_the_rest_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    y = Dropout(p)(torch.ones(401, 997, dtype=dtype))
    dropped = y == 0
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / y.numel()) ** 0.5)
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - p)))
    for along in (0, 1):  # neighbours share 64 random bits, and nothing else
        both = dropped.narrow(along, 1, 400) & dropped.narrow(along, 0, 400)
        assert both.double().mean().item() == pytest.approx(p * p, rel=0.15)


def test_every_place_among_the_bits_has_the_same_probability() -> None:
    torch.manual_seed(2)
    dropped = Dropout(0.5)(torch.ones(1 << 18)) == 0
    assert (dropped.view(-1, 4).double().mean(0) - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_masks_are_a_function_of_the_random_state_alone(size: int) -> None:
    layer, states, masks = Dropout(0.5), [], []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(3)
        masks.append(torch.cat([layer(torch.ones(size, 5, dtype=dtype)) for _ in range(2)]) == 0)
        states.append(torch.get_rng_state())
    assert all(torch.equal(mask, masks[0]) for mask in masks) and all(torch.equal(one, states[0]) for one in states)
    assert not torch.equal(masks[0][:size], masks[0][size:]) or size == 1


def test_rows_are_dropped_as_a_whole() -> None:
    y = Dropout(0.5, rows=True)(torch.ones(9, 50, 6))
    assert (y == y[..., :1]).all() and 0 < (y[..., 0] == 0).sum() < 450


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.999999])
def test_the_ends_of_the_probability(p: float) -> None:
    layer, x = Dropout(p), torch.randn(1000)
    dropped = (layer(x) == 0).sum()
    assert dropped == 0 if p < 0.5 else dropped > 990
    assert torch.equal(layer.eval()(x), x)
