"""All strings of at most four letters, enumerated: does each method find the optimum that is known in closed form?

The reward less beta times the divergence from the reference is largest for one policy, π_ref exp(r / beta) / Z.
The policy here is a bigram table. So that a table can be that one, the reward is a sum over pairs of letters: beta
times the logarithm of another table's probabilities over the reference's; any constant may be added to it.

Shapes: S strings, T tokens, V vocabulary: letters, and 0, which begins and ends a string.
"""

import itertools

import pytest
import torch
from torch import Tensor

from lm.backprop.policy import clipped, log_probabilities, preference, value_error
from lm.data.chunks import IGNORED
from lm.models import Bigram
from lm.posttraining import rollouts

V, LONGEST, BETA = 4, 4, 0.5


def strings() -> tuple[Tensor, Tensor]:
    """Return the tokens and targets, both (S, T), of all strings: ended, or cut at four letters."""
    rows = []
    for length in range(LONGEST + 1):
        for letters in itertools.product(range(1, V), repeat=length):
            rows.append(([0, *letters, 0] + [IGNORED] * LONGEST)[: LONGEST + 1])
    ids = torch.tensor(rows)  # (S, T + 1)
    return ids[:, :-1].clamp(min=0), ids[:, 1:]


TOKENS, TARGETS = strings()


def logs_of(table: Tensor) -> Tensor:
    """Return all strings' log-probabilities (S,) by the logits of a bigram table (V, V)."""
    return log_probabilities(table[TOKENS], TARGETS)[0].sum(1)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Return a reference's table, the strings' rewards (S,), and the optimum's log-probabilities (S,)."""
    torch.manual_seed(1)
    reference, better = torch.randn(2, V, V, dtype=torch.float64)
    rewards = BETA * (logs_of(better) - logs_of(reference)) + 3.0
    optimum = (logs_of(reference) + rewards / BETA).log_softmax(0)
    torch.testing.assert_close(optimum, logs_of(better))
    return reference, rewards, optimum


def divergence(table: Tensor, optimum: Tensor) -> float:
    """Return KL(π ‖ optimum)."""
    logs = logs_of(table)
    assert abs(float(logs.exp().sum()) - 1) < 1e-12  # they are all
    return float((logs.exp() * (logs - optimum)).sum())


def policy(reference: Tensor) -> Bigram:
    net = Bigram(V, LONGEST).double()
    net.table.weight.data.copy_(reference)
    return net


def test_dpo_finds_the_optimum() -> None:
    """From all pairs, weighted by how often the reference writes them, and the one of them is preferred."""
    reference, rewards, optimum = problem()
    net, chances = policy(reference), logs_of(reference).exp()
    often = chances[:, None] * chances * torch.sigmoid(rewards[:, None] - rewards)  # (S, S): the row's is preferred
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, total_iters=200)
    assert divergence(net.table.weight.detach(), optimum) > 0.2
    for _ in range(200):
        with torch.no_grad():  # by hand, from the margins to the table
            logs, backward = log_probabilities(net(TOKENS), TARGETS)  # (S, T)
            scores = BETA * (logs.sum(1) - logs_of(reference))  # (S,)
            dmargins = often * preference(scores[:, None] - scores)[1]  # (S, S)
            dscores = BETA * (dmargins.sum(1) - dmargins.sum(0))
            dlogits = backward(dscores.unsqueeze(1).expand_as(logs))  # (S, T, V)
            net.table.weight.grad = torch.zeros(V, V, dtype=torch.float64)
            net.table.weight.grad.index_add_(0, TOKENS.flatten(), dlogits.flatten(0, 1))
        optimizer.step()
        schedule.step()
    assert divergence(net.table.weight.detach(), optimum) < 0.01


@pytest.mark.parametrize("baseline", ["group", "value"])
def test_the_policy_gradient_finds_the_optimum(baseline: str) -> None:
    """With texts that the policy draws, the divergence in the reward, and two clipped steps on each set.

    The baseline is the mean of a group, or what a table of values expects at each place after each letter.
    """
    reference, rewards, optimum = problem()
    torch.manual_seed(3)
    net, table = policy(reference), torch.zeros(LONGEST, V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": net.parameters()}, {"params": [table], "lr": 0.3}], lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=200)
    for _ in range(100):
        drawn = torch.multinomial(logs_of(net.table.weight.detach()).exp(), 512, replacement=True)
        tokens, targets = TOKENS[drawn], TARGETS[drawn]
        counts = targets != IGNORED
        old = log_probabilities(net(tokens), targets)[0].detach()
        apart = old - log_probabilities(reference[tokens], targets)[0]
        earned = rollouts.token_rewards(rewards[drawn], BETA * apart, counts)
        if baseline == "group":
            better = rollouts.above_mean(earned.sum(1), 16, scaled=False).unsqueeze(1)
        else:
            expected = table[torch.arange(LONGEST), tokens].detach()
            better = rollouts.advantages(earned, expected, counts, 1.0)
            earned = better + expected
        weights = rollouts.token_weights(counts, 16, "sum")
        for _ in range(2):
            optimizer.zero_grad()
            losses, _ = clipped(log_probabilities(net(tokens), targets)[0], old, better, 0.2)
            if baseline == "value":
                losses = losses + value_error(table[torch.arange(LONGEST), tokens], earned)[0]
            (weights * losses).sum().backward()
            optimizer.step()
            schedule.step()
    assert divergence(net.table.weight.detach(), optimum) < 0.01
