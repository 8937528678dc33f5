import math

import pytest
import torch
from torch.nn import functional as F

from lm.models import MLP
from lm.models.layers import BatchNorm, calibrate


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "block_size", "parameters"),
    [({}, 3, 12_097), ({"bias": True, "bessel": True}, 3, 12_297), ({}, 8, 22_097)],
)
def test_sizes_are_the_lectures(settings: dict, block_size: int, parameters: int) -> None:
    assert count(MLP(27, block_size, **settings)) == parameters


def test_it_is_the_formula() -> None:
    net = MLP(27, 3, n_embd=4, n_hidden=8, n_layer=2, bias=True).double().train()
    tokens = torch.randint(27, (16, 3))
    x = net.wte.weight[tokens].reshape(16, 12)
    for linear, norm in ((net.hidden[0], net.hidden[1]), (net.hidden[3], net.hidden[4])):
        x = x @ linear.weight.T + linear.bias
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
        x = x.tanh()
    expected = x @ net.lm_head.weight.T + net.lm_head.bias
    torch.testing.assert_close(net(tokens), expected, rtol=1e-10, atol=1e-12)


def test_untrained_loss_is_nearly_uniform() -> None:
    net = MLP(27, 3)
    tokens, targets = torch.randint(27, (500, 3)), torch.randint(27, (500,))
    assert F.cross_entropy(net(tokens), targets).item() == pytest.approx(math.log(27), abs=0.05)


def test_short_contexts_are_padded_in_front_with_token_0() -> None:
    net = MLP(27, 3).eval()
    assert torch.equal(net(torch.tensor([[5]])), net(torch.tensor([[0, 0, 5]])))
    with pytest.raises(ValueError, match="4 tokens is longer than block_size 3"):
        net(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", ["n_embd", "n_hidden", "n_layer"])
def test_bad_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        MLP(27, 3, **{name: 0})


@pytest.mark.parametrize("shape", [(32, 6), (8, 4, 6)])
@pytest.mark.parametrize("bessel", [False, True])
def test_batch_norm_is_torchs_over_all_leading_dimensions(shape: tuple[int, ...], bessel: bool) -> None:
    ours, theirs = BatchNorm(6, bessel=bessel).double(), torch.nn.BatchNorm1d(6).double()
    for layer in (ours, theirs):
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    rows = x.flatten(0, -2)
    expected = theirs(rows)
    if bessel:
        normal = (rows - rows.mean(0)) / (rows.var(0, unbiased=True) + 1e-5).sqrt()
        expected = normal * ours.weight + ours.bias
    torch.testing.assert_close(ours(x).flatten(0, -2), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x).flatten(0, -2), theirs.eval()(rows), rtol=1e-10, atol=1e-12)


def test_statistics_for_each_position_alone() -> None:
    layer = BatchNorm(6, n_positions=4).double()
    x = torch.randn(32, 4, 6, dtype=torch.float64) + torch.arange(4.0).view(4, 1)
    torch.testing.assert_close(layer(x).mean(0), torch.zeros(4, 6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0), rtol=1e-12, atol=1e-12)


def test_a_single_example_in_training_is_refused() -> None:
    layer = BatchNorm(6)
    for x in (torch.zeros(1, 6), torch.zeros(1, 1, 6)):
        with pytest.raises(ValueError, match="needs at least 2 examples"):
            layer(x)
    assert layer.eval()(torch.zeros(1, 6)).shape == (1, 6)
    with pytest.raises(ValueError, match="momentum is 0"):
        BatchNorm(6, momentum=0.0)


@pytest.mark.parametrize("bessel", [False, True])
def test_calibration_is_the_whole_sets_statistics_however_it_is_cut(bessel: bool) -> None:
    net = MLP(27, 3, n_embd=4, n_hidden=8, bessel=bessel).double().eval()
    tokens = torch.randint(27, (1000, 3))
    assert calibrate(net, tokens.split(170)) == 1
    assert not net.training
    made = net.hidden[0](net.wte(tokens).flatten(1))
    torch.testing.assert_close(net.hidden[1].running_mean, made.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net.hidden[1].running_var, made.var(0), rtol=1e-10, atol=1e-12)
    assert calibrate(torch.nn.Linear(2, 2), []) == 0


def test_calibration_that_fails_leaves_training_as_it_was() -> None:
    net = MLP(27, 3)
    with pytest.raises(ValueError, match="longer than block_size"):
        calibrate(net, [torch.zeros(5, 4, dtype=torch.int64)])
    before = net.hidden[1].running_mean.clone()
    net(torch.randint(27, (8, 3)))
    assert not torch.equal(net.hidden[1].running_mean, before)
