"""All strings of at most four letters, enumerated: does each method find the optimum that is known in closed form?

The reward less beta times the divergence from the reference is largest for one policy, π_ref exp(r / beta) / Z.
The policy here is a bigram table. So that a table can be that one, the reward is a sum over pairs of letters: beta
times the logarithm of another table's probabilities over the reference's; any constant may be added to it.

Shapes: S strings, T tokens, V vocabulary: letters, and 0, which begins and ends a string.
"""

import itertools

import torch
from torch import Tensor

from lm.backprop.policy import clipped, log_probabilities, preference
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


def test_the_policy_gradient_finds_the_optimum() -> None:
    """With texts that the policy draws, in groups, the divergence in the reward, and two clipped steps on each set."""
    reference, rewards, optimum = problem()
    torch.manual_seed(3)
    net = policy(reference)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=200)
    for _ in range(100):
        with torch.no_grad():
            before = logs_of(net.table.weight)
        drawn = torch.multinomial(before.exp(), 512, replacement=True)
        tokens, targets = TOKENS[drawn], TARGETS[drawn]
        old = log_probabilities(net(tokens), targets)[0].detach()
        worth = (rewards - BETA * (before - logs_of(reference)))[drawn]
        above = rollouts.above_mean(worth, 16, scaled=False).unsqueeze(1)
        weights = rollouts.token_weights(targets != IGNORED, 16, "sum")
        for _ in range(2):
            optimizer.zero_grad()
            losses, _ = clipped(log_probabilities(net(tokens), targets)[0], old, above, 0.2)
            (weights * losses).sum().backward()
            optimizer.step()
            schedule.step()
    assert divergence(net.table.weight.detach(), optimum) < 0.01
