"""Losses of preferences and rewards against autograd in float64, and what is found where one is wrong."""

import pytest
import torch
from torch.nn import functional as F

from lm.backprop.policy import clipped, entropy, log_probabilities, preference, value_error
from tests.support.mutants import Mutant, broken

V, IGNORED = 7, -100
CLOSE = {"rtol": 1e-10, "atol": 1e-13}
MUTANTS = [
    Mutant("policy", "-weights * logs.exp()", "weights * logs.exp()", "log-probabilities: sign of the softmax"),
    Mutant("policy", "(-weights * logs.exp()).scatter_add(-1, index, weights)", "-weights * logs.exp()", "no target"),
    Mutant("policy", "dlogs.where(counts, 0.0).unsqueeze(-1)", "dlogs.unsqueeze(-1)", "ignored targets count"),
    Mutant("policy", "torch.sigmoid(margins) - (1 - smoothing)", "torch.sigmoid(margins) - 1", "smoothing forgotten"),
    Mutant("policy", "torch.sigmoid(margins) - (1 - smoothing)", "torch.sigmoid(-margins) - (1 - smoothing)", "-m"),
    Mutant("policy", "torch.where(free <= bounded, -free, 0.0)", "-free", "clipped: the constant part has a slope"),
    Mutant("policy", "torch.where(free <= bounded, -free, 0.0)", "torch.where(free <= bounded, -advantages, 0.0)", "r"),
    Mutant("policy", "torch.where(free <= bounded, -free, 0.0)", "torch.where(free < bounded, -free, 0.0)", "r = 1"),
    Mutant("policy:entropy", "logs + found.unsqueeze(-1)", "logs", "the mean is forgotten"),
    Mutant("policy:entropy", "chances = logs.exp()", "chances = torch.ones_like(logs)", "not by chance"),
    Mutant("policy:entropy", "-chances", "chances", "entropy: sign"),
    Mutant("policy:entropy", "dentropy.where(counts, 0.0)", "dentropy", "entropy: ignored targets count"),
    Mutant("policy:entropy", "found.where(counts, 0.0)", "found", "entropy of what nobody wrote"),
    Mutant("policy", "error * error / 2", "error * error", "value: the half is forgotten"),
    Mutant("policy", "values - earned", "earned - values", "value: sign"),
]  # fmt: skip


def check_log_probabilities() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 2, 5, V, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (3, 2, 5))
    targets[torch.rand(targets.shape) < 0.3] = IGNORED
    wanted = -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    weights = torch.randn(targets.shape, dtype=torch.float64)
    (dlogits,) = torch.autograd.grad((weights * wanted).sum(), logits)
    with torch.no_grad():
        found, backward = log_probabilities(logits, targets)
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(backward(weights), dlogits, **CLOSE)


def check_entropy() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 5, V, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (3, 5))
    targets[torch.rand(targets.shape) < 0.3] = IGNORED
    wanted = torch.distributions.Categorical(logits=logits).entropy() * (targets != IGNORED)
    weights = torch.randn(targets.shape, dtype=torch.float64)
    (dlogits,) = torch.autograd.grad((weights * wanted).sum(), logits)
    with torch.no_grad():
        found, backward = entropy(logits, targets)
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(backward(weights), dlogits, **CLOSE)


def check_value_error() -> None:
    values = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    earned = torch.tensor([[0.5, 1.0, 0.5]], dtype=torch.float64)
    error, dvalues = value_error(values, earned)
    torch.testing.assert_close(error.detach(), torch.tensor([[0.125, 4.5, 0.0]], dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(dvalues, *torch.autograd.grad(error.sum(), values), **CLOSE)


def check_preference() -> None:
    margins = torch.linspace(-40, 40, 33, dtype=torch.float64, requires_grad=True)
    for smoothing in (0.0, 0.1):
        p, q = torch.sigmoid(margins.detach()), torch.sigmoid(-margins.detach())
        loss, dmargins = preference(margins, smoothing)
        torch.testing.assert_close(loss, -(1 - smoothing) * p.log() - smoothing * q.log(), **CLOSE)
        torch.testing.assert_close(dmargins, *torch.autograd.grad(loss.sum(), margins), **CLOSE)


def check_clipped() -> None:
    torch.manual_seed(2)
    logs, old = torch.randn(2, 6, 5, dtype=torch.float64)
    old[0] = logs[0]  # ratios of 1, as in the first step
    logs.requires_grad_()
    above = torch.randn(6, 1, dtype=torch.float64)
    ratio = (logs - old).exp()
    wanted = -torch.where(above > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * above
    loss, dlogs = clipped(logs, old, above, 0.2)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    torch.testing.assert_close(dlogs, *torch.autograd.grad(wanted.sum(), logs), **CLOSE)
    assert torch.equal(dlogs[0].detach(), (-above * torch.ones_like(logs))[0].detach()), (
        "REINFORCE where the ratio is 1"
    )
    assert 0 < int((dlogs == 0).sum()) < dlogs.numel()


def checks() -> None:
    check_clipped()
    check_entropy()
    check_value_error()
    check_log_probabilities()
    check_preference()


def test_gradients_are_autograds() -> None:
    checks()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_one_is_found(mutant: Mutant) -> None:
    with broken(mutant), pytest.raises(AssertionError):
        checks()
    checks()
