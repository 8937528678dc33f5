"""The lectures' pictures, of a network and its first batch."""

from functools import partial

import numpy as np
import pytest
import torch

from lm.course import diagrams, figures
from lm.models import GPT, LSTM, MLP, WaveNet
from tests.support.cases import often

SYMBOLS = list(".abcdefghij")
ADAM = partial(torch.optim.AdamW, lr=1e-3)


@pytest.mark.parametrize(("net", "fixed", "names"), often([
    (MLP(11, 3, n_hidden=20, bias=True), True, {"forward-and-backward", "activations-hidden.2", "dlogits", "updates"}),
    (WaveNet(11, 8, n_hidden=9), True, {"activations-h.0.3", "fusion-tree", "dlogits", "embedding", "updates"}),
    (GPT(11, 8, n_layer=2, n_head=2, n_embd=8), False, {"attention-block-1", "averages", "dlogits"}),
    (LSTM(11, 8), False, {"dlogits", "embedding", "updates"}),
], 1))  # fmt: skip
def test_a_network_has_pictures(net: torch.nn.Module, fixed: bool, names: set[str]) -> None:
    tokens = torch.randint(11, (6, net.block_size))
    targets = torch.randint(11, (6,) if fixed else tokens.shape)
    found = figures.draw(net, tokens, targets, SYMBOLS, ADAM)
    assert names <= set(found)
    for name, pixels in found.items():
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and min(pixels.shape[:2]) > 30, name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2, name  # something is drawn


def test_the_first_three_averages_are_the_same_table() -> None:
    """A weight of 1 is a cell of the darkest blue: a mean has one, that of the first position."""
    mean = torch.ones(8, 8).tril() / torch.ones(8, 8).tril().sum(1, keepdim=True)
    for head, cells in ((mean, 4), (torch.eye(8), 3 + 8)):
        darkest = np.all(figures.averages(head, SYMBOLS[:8]) == np.array(diagrams.BLUE), axis=2).sum()
        assert darkest == cells * 12 * 12


def test_what_is_used_twice_is_red() -> None:
    once = diagrams.passes({"a": [2, 3], "b": [2]}, {"a": ["b"]})
    twice = diagrams.passes({"a": [2, 3], "b": [2]}, {"a": ["b", "b"]})
    red = np.all(twice == np.array(diagrams.RED), axis=2).sum() - np.all(once == np.array(diagrams.RED), axis=2).sum()
    assert red > 0


def test_a_bar_is_as_long_as_its_number() -> None:
    pixels = diagrams.bars({"a": -1.0, "b": -2.0}, "t")
    lengths = [int(np.all(row == np.array(diagrams.BLUE), axis=1).sum()) for row in pixels]
    assert {length for length in lengths if length > 100} == {151, 301}
