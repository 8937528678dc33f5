"""Pictures of matrices: what is in them is told by the pixels."""

import numpy as np
import torch

from lm.training.callbacks import pictures


def test_attention_is_a_panel_a_head_with_names_and_a_bar() -> None:
    weights = torch.eye(6).expand(2, 6, 6)
    picture = pictures.attention(weights, list("abcdef"))
    blue = (picture == np.array([8, 48, 107])).all(-1)
    assert blue.sum() >= 2 * 6 * 11 * 11  # the diagonals of two heads
    other = pictures.attention(weights, list("abcdeW"))
    assert other.shape != picture.shape or (other != picture).any(), "the names are drawn"
    assert pictures.attention(weights[:1], list("abcdef")).shape[1] < picture.shape[1]


def test_dlogits_are_blue_where_a_logit_is_pushed_up_and_red_where_it_is_pulled_down() -> None:
    rows = torch.tensor([[-1.0, 0.0, 1.0]])
    picture = pictures.dlogits(rows, ["x", "y", "z"])
    blue, red = ((picture == np.array(colour)).all(-1) for colour in ((8, 48, 107), (165, 15, 21)))
    bar = picture.shape[1] - 60  # the colour bar is at the right
    assert blue[:, :bar].any() and red[:, :bar].any()
    assert np.nonzero(blue[:, :bar])[1].max() < np.nonzero(red[:, :bar])[1].min()


def test_a_dead_neuron_is_a_full_column() -> None:
    stuck = torch.zeros(20, 30, dtype=torch.bool)
    stuck[:, 7] = True
    blue = (pictures.stuck_units(stuck, "tanh") == np.array([8, 48, 107])).all(-1)
    columns = np.nonzero(blue.sum(0) >= 20 * 12)[0]
    assert len(columns) == 12  # one cell wide


def test_wide_and_silent_matrices_have_pictures() -> None:
    assert pictures.dlogits(torch.zeros(2, 1000), [""] * 1000).shape[1] >= 4000
