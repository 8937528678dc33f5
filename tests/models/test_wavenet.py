import pytest
import torch

from lm.models import GatedWaveNet, WaveNet


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def fitted(net: torch.nn.Module) -> torch.nn.Module:
    """Statistics and gains as after training, so that none can be left out unseen."""
    for name, value in net.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2)
        elif "running_mean" in name or ".2." in name:
            value.normal_()
    return net.double().eval()


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"n_embd": 10, "n_hidden": 68}, 22_397),
        ({"n_embd": 10, "n_hidden": 68, "norm_over_time": False}, 22_397),
        ({"n_embd": 24, "n_hidden": 128}, 76_579),
    ],
)
def test_sizes_are_the_lectures(settings: dict, parameters: int) -> None:
    assert count(WaveNet(27, 8, **settings)) == parameters


@pytest.mark.parametrize(("fuse", "block_size"), [(2, 2), (2, 8), (2, 16), (3, 9), (4, 16), (8, 8)])
def test_slid_over_a_sequence_it_equals_the_convolutions(fuse: int, block_size: int) -> None:
    net = fitted(WaveNet(27, block_size, n_embd=6, n_hidden=10, fuse=fuse))
    tokens = torch.randint(27, (3, 40))
    slid = torch.stack([net(tokens[:, max(0, t - block_size + 1) : t + 1]) for t in range(40)], dim=1)
    torch.testing.assert_close(net.convolve(tokens), slid, rtol=1e-10, atol=1e-12)


def test_dense_is_the_same_function_with_the_same_names() -> None:
    net = fitted(WaveNet(27, 8, n_embd=6, n_hidden=10))
    dense = WaveNet(27, 20, n_embd=6, n_hidden=10, depth=3, dense=True).double().eval()
    dense.load_state_dict(net.state_dict())
    tokens = torch.randint(27, (2, 20))
    assert torch.equal(dense(tokens), net.convolve(tokens))
    assert dense(tokens).shape == (2, 20, 27)


def test_its_training_statistics_are_over_batch_and_time_or_each_position() -> None:
    tokens = torch.randint(27, (64, 8))
    joint, single = (WaveNet(27, 8, n_embd=6, n_hidden=10, norm_over_time=flag) for flag in (True, False))
    joint(tokens), single(tokens)
    assert [tuple(block[2].running_mean.shape) for block in joint.h] == [(10,), (10,), (10,)]
    assert [tuple(block[2].running_mean.shape) for block in single.h] == [(4, 10), (2, 10), (10,)]


@pytest.mark.parametrize(
    ("block_size", "settings", "message"),
    [
        (9, {}, "block_size 9 is not a power of fuse 2: use 16"),
        (8, {"fuse": 3}, "block_size 8 is not a power of fuse 3: use 9"),
        (8, {"fuse": 1}, "fuse is 1"),
        (8, {"depth": 2}, "depth 2 fuses 4 tokens, block_size is 8"),
        (8, {"n_hidden": 0}, "n_hidden is 0"),
        (8, {"dense": True, "norm_over_time": False}, "does not go with dense"),
    ],
)
def test_what_does_not_fit_is_refused(block_size: int, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveNet(27, block_size, **settings)


def test_the_gated_unit_is_the_papers() -> None:
    block = GatedWaveNet(27, 16, n_embd=5, n_layer=2).double().h[1]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    before = torch.cat([torch.zeros(2, 5, 2, dtype=torch.float64), x[:, :, :-2]], dim=2)  # dilation 2
    taps = torch.einsum("oc,bct->bot", block.conv.weight[:, :, 0], before)
    taps = taps + torch.einsum("oc,bct->bot", block.conv.weight[:, :, 1], x) + block.conv.bias[:, None]
    unit = taps[:, :5].tanh() * taps[:, 5:].sigmoid()
    both = torch.einsum("oc,bct->bot", block.proj.weight[:, :, 0], unit) + block.proj.bias[:, None]
    stream, skip = block(x)
    torch.testing.assert_close(stream, x + both[:, :5], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(skip, both[:, 5:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: WaveNet(27, 32, depth=3, dense=True), lambda: GatedWaveNet(27, 32)])
def test_no_position_sees_a_later_one_nor_one_past_its_reach(make) -> None:
    net = make().double().eval()
    tokens = torch.randint(27, (1, 32))
    before = net(tokens)
    reach = 8 if isinstance(net, WaveNet) else 16
    for t in (3, 10, 15):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 27
        differs = (net(changed) - before).abs().amax(-1)[0] > 1e-9
        assert differs.nonzero().flatten().tolist() == list(range(t, min(32, t + reach)))


def test_gated_sizes_and_limits() -> None:
    net = GatedWaveNet(27, 16, n_embd=8, n_layer=3, n_stack=2, dropout=0.5)
    assert [block.dilation for block in net.h] == [1, 2, 4, 1, 2, 4]
    assert not torch.equal(net(torch.zeros(1, 4, dtype=torch.int64)), net(torch.zeros(1, 4, dtype=torch.int64)))
    for settings, message in (({"n_layer": 0}, "n_layer is 0"), ({"dropout": 1.0}, "dropout is 1")):
        with pytest.raises(ValueError, match=message):
            GatedWaveNet(27, 16, **settings)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        net(torch.zeros(1, 17, dtype=torch.int64))
