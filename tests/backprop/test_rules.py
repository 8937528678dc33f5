"""Every rule and every network against autograd in float64; autograd is here the judge, central differences below."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lm.backprop import Gradients, NoRuleError, check, run
from lm.training.compute import blocks
from tests.support.gradients import (
    LAYERS,
    NETWORKS,
    assert_attention,
    assert_gradients_add_up,
    assert_layer,
    assert_loss_and_head,
    assert_same,
    batch,
    both,
    make,
)


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers work on a few rows at a time, as they do on large tensors."""
    monkeypatch.setattr("lm.models.parts.PART", 50)


@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_against_autograd(name: str, training: bool, ignored: bool) -> None:
    net = make(name).train(training)
    assert_same(net, *batch(net, 5, ignored=ignored))


@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name.split()[0] in ("gpt", "gated", "seq2seq", "encoder")]
)
def test_blocks_that_are_computed_again(name: str) -> None:
    net = make(name)
    assert blocks(net)
    assert_same(net, *batch(net, 5), recomputed=tuple(blocks(net)))


@pytest.mark.parametrize("name", [name for name in NETWORKS if "mlp" not in name and "wavenet" not in name])
def test_one_sequence_of_one_token(name: str) -> None:
    assert_same(net := make(name), *batch(net, 1, time=1))


@pytest.mark.parametrize("name", ["mlp by hand", "wavenet", "wavenet per position", "wavenet dense", "gated wavenet"])
def test_one_sequence_shorter_than_the_context(name: str) -> None:
    net = make(name).train(name == "gated wavenet")  # of one example there is no variance
    assert_same(net, *batch(net, 1, time=2))


@pytest.mark.parametrize("name", NETWORKS)
def test_against_central_differences(name: str) -> None:
    """Autograd is not the authority: along a random direction of each parameter the loss changes as it must."""
    net = make(name)
    tokens, targets = batch(net, 6)
    _, found, _, _ = both(net, tokens, targets)
    step = 1e-6  # at 1e-5 some ReLU passes its kink
    for key, parameter in net.named_parameters():
        direction = torch.randn_like(parameter)
        losses = []
        for sign in (1, -2):
            parameter.data += sign * step * direction
            torch.manual_seed(5)
            losses.append(F.cross_entropy(net(tokens).flatten(0, -2), targets.flatten()).item())
        parameter.data += step * direction
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float((found[key] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), key


@pytest.mark.parametrize("name", LAYERS)
def test_layer_against_autograd(name: str) -> None:
    assert_layer(name)


@pytest.mark.parametrize("time", [1, 100, 128, 300])
def test_attention_is_right_at_every_length(time: int) -> None:
    assert_attention(time)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_loss_and_head_in_chunks(shape: tuple[int, ...], cap: float | None) -> None:
    assert_loss_and_head(shape, cap)


def test_gradients_add_up_and_frozen_parameters_have_none() -> None:
    assert_gradients_add_up()


def test_a_layer_without_rule_is_named() -> None:
    class Mine(nn.Linear):
        """Could compute anything."""

    net = make("gpt")
    net.h[0].mlp.activation = nn.Mish()
    with pytest.raises(NoRuleError, match=r"Mish: write a rule for it"):
        check(net)
    with pytest.raises(NoRuleError, match="Mine"):
        run(Mine(2, 2), Gradients(), torch.zeros(1, 2))
    for name in NETWORKS:
        check(NETWORKS[name]())


def assert_repeatable(forward: Callable[[Gradients], tuple[torch.Tensor, Callable]]) -> None:
    """A backward pass that is run again says the same, or refuses to: what it kept is gone."""
    with torch.no_grad():
        y, backward = forward(Gradients())
        dy = torch.randn_like(y)
        first = backward(dy)
        try:
            again = backward(dy)
        except RuntimeError as error:
            if "run the forward pass again" not in str(error):
                raise
        else:
            assert torch.equal(again, first) if isinstance(first, torch.Tensor) else again is first is None


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_backward_pass_a_second_time(name: str) -> None:
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    assert_repeatable(lambda grads: run(layer, grads, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_backward_pass_a_second_time(name: str) -> None:
    net = make(name)
    tokens, _ = batch(net, 5)
    assert_repeatable(lambda grads: run(net, grads, tokens))


def test_a_chain_refuses_a_second_time_even_if_it_is_empty() -> None:
    for layers in ((), (nn.Tanh(),), (nn.Linear(3, 3), nn.Tanh())):
        _, backward = run(nn.Sequential(*layers), Gradients(), torch.randn(2, 3))
        backward(torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="run the forward pass again"):
            backward(torch.ones(2, 3))
