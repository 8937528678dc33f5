"""Speculative decoding: the greedy text is the same, and sampled text has the same distribution."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch

from lm.errors import UserError
from lm.generation import Sampler, generate
from lm.generation.speculation import Draft, Repetition, SmallerNetwork, speculate
from lm.models import GPT
from tests.support.cases import often

V, BLOCK = 5, 32


def made(seed: int, **settings: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(V, BLOCK, **{"n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.8} | settings).double().eval()


def drafts(sampler: Sampler) -> dict[str, Draft]:
    generator = torch.Generator().manual_seed(9)
    return {
        "smaller": SmallerNetwork(made(2), sampler, generator),
        "itself": SmallerNetwork(made(1, n_layer=2), sampler, generator),
        "repetition": Repetition(V),
    }


@pytest.mark.parametrize("name", ["smaller", "itself", "repetition"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_greedy_text_is_the_same(name: str, positions: str) -> None:
    net, sampler = made(1, n_layer=2, positions=positions), Sampler(temperature=0)
    for length in (1, 3, 20, BLOCK):
        prompt = torch.randint(V, (1, length))
        plain = generate(net, prompt, sampler=sampler, generator=torch.Generator())
        guessed = speculate(net, prompt, drafts(sampler)[name], sampler=sampler, generator=torch.Generator(), ahead=3)
        tokens = list(islice(guessed, BLOCK - length + 6))  # beyond the context, too
        assert tokens == [int(next(plain)) for _ in tokens]


@pytest.mark.parametrize("draws", [1000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", often(["smaller", "repetition"]))
def test_the_distribution_is_the_same(name: str, draws: int) -> None:
    """χ² of draws of two tokens together, of 25 pairs: 51.2 is exceeded once in a thousand times."""
    net, sampler = made(1, n_layer=2), Sampler(temperature=0.8)
    prompt, generator = torch.tensor([[1, 2, 1]]), torch.Generator().manual_seed(3)
    draft = drafts(Sampler(temperature=1.5))[name]
    expected: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        for a in range(V):
            first = sampler.probabilities(net(prompt)[:, -1], prompt)[0, a]
            after = torch.cat([prompt, torch.tensor([[a]])], dim=1)
            second = sampler.probabilities(net(after)[:, -1], after)[0]
            expected |= {(a, b): float(first * second[b]) for b in range(V)}
    found = Counter(
        tuple(islice(speculate(net, prompt, draft, sampler=sampler, generator=generator, ahead=3), 2))
        for _ in range(draws)
    )
    chi = sum((found[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert chi < 51.2, found


def test_guesses_are_kept() -> None:
    """The network guessing for itself is always right: it is asked once for five tokens."""
    sampler, net = Sampler(temperature=0), made(1, n_layer=2)
    calls: list[int] = []
    net.register_forward_hook(lambda net, inputs, out: calls.append(inputs[0].shape[1]))
    draft = drafts(sampler)["itself"]
    assert (
        len(list(islice(speculate(net, torch.tensor([[1]]), draft, sampler=sampler, generator=torch.Generator()), 20)))
        == 20
    )
    assert len(calls) == 4


def test_repetition_finds_the_longest() -> None:
    guesses, drawn_from = Repetition(9).guess(torch.tensor([[1, 2, 3, 4, 5, 8, 3, 6, 1, 2, 3]]), 2)
    assert guesses.tolist() == [4, 5] and drawn_from.argmax(1).tolist() == [4, 5]
    assert len(Repetition(9).guess(torch.tensor([[1, 2, 3]]), 2)[0]) == 0


def test_another_vocabulary() -> None:
    with pytest.raises(UserError, match="the draft has 9 symbols, the network 5"):
        next(speculate(made(1), torch.tensor([[1, 1]]), Repetition(9), sampler=Sampler(), generator=torch.Generator()))
