"""Recurrent networks compute what torch's own layers compute, and forget nothing between calls."""

from typing import Any

import pytest
import torch
from torch import nn

from lm.models import GRU, LSTM, RNN

V, T = 11, 8


@pytest.mark.parametrize(("kind", "torchs"), [(RNN, nn.RNN), (GRU, nn.GRU), (LSTM, nn.LSTM)])
def test_as_torchs_own_with_the_same_weights(kind: type[RNN], torchs: Any) -> None:
    torch.manual_seed(1)
    net = kind(V, T, n_embd=3, n_hidden=5, n_layer=2).double()
    own = torchs(3, 5, num_layers=2, batch_first=True).double()
    names = {"read.weight": "weight_ih", "recur.weight": "weight_hh", "read.bias": "bias_ih", "recur.bias": "bias_hh"}
    for i, layer in enumerate(net.h):
        for ours, name in names.items():
            getattr(own, f"{name}_l{i}").data.copy_(layer.get_parameter(ours).data)
    tokens = torch.randint(V, (4, T))
    expected = net.lm_head(own(net.wte(tokens))[0])
    torch.testing.assert_close(net(tokens), expected, rtol=1e-12, atol=1e-13)


def test_the_first_weights_are_as_small_as_torchs_own() -> None:
    torch.manual_seed(1)
    net = LSTM(V, T, n_hidden=64)
    for parameter in net.h.parameters():
        assert 0.1 < parameter.abs().max() <= 64**-0.5


def test_too_long() -> None:
    with pytest.raises(ValueError, match="longer than block_size 8"):
        GRU(V, T)(torch.zeros(1, T + 1, dtype=torch.int64))
