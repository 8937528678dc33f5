"""What the tokens of a policy's texts are worth, against sums written out."""

import pytest
import torch

from lm.models import Bigram
from lm.posttraining import rollouts
from lm.tokenizers import CharTokenizer
from tests.support.mutants import Mutant, broken

MUTANTS = [
    Mutant("posttraining.rollouts", "F.pad(values[:, 1:], (0, 1))", "values", "the next value"),
    Mutant("posttraining.rollouts", "error + decay * sums", "error + sums", "the decay"),
    Mutant("posttraining.rollouts", "values = values.where(counts, 0.0)", "pass", "the value after the end"),
    Mutant("posttraining.rollouts", "counts.cumsum(1) == counts.sum(1, keepdim=True)", "counts.cumsum(1) == 1", "last"),
    Mutant("posttraining.rollouts", "last * given.unsqueeze(1) - costs", "last * given.unsqueeze(1)", "the cost"),
]


def check() -> None:
    """Texts of two, four and one tokens, among others that the policy did not write."""
    torch.manual_seed(1)
    counts = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    given = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    costs, values = torch.randn(2, 3, 5, dtype=torch.float64)
    rewards = rollouts.token_rewards(given, costs, counts)
    for decay in (0.0, 0.7, 1.0):
        found = rollouts.advantages(rewards, values, counts, decay)
        for n in range(3):
            places = counts[n].nonzero().flatten().tolist()
            earned = [-costs[n, t] + given[n] * (t == places[-1]) for t in places]
            expected = [*values[n, places], 0.0]
            for i, t in enumerate(places):
                wanted = sum(
                    decay ** (j - i) * (earned[j] + expected[j + 1] - expected[j]) for j in range(i, len(places))
                )
                torch.testing.assert_close(found[n, t], torch.as_tensor(wanted), rtol=1e-12, atol=1e-13)
        assert (found[~counts] == 0).all()
    whole = rollouts.advantages(rewards, values, counts, 1.0)[1, 0] + values[1, 0]
    torch.testing.assert_close(whole, rewards[1].sum(), rtol=1e-12, atol=0)


def test_an_answer_may_fill_the_context_and_be_ended_by_one_token_more() -> None:
    """Or the longest sums would never end where the data has room for no more."""
    tokenizer, context = CharTokenizer("abc.", end="."), 6
    net = Bigram(4, context).eval()
    net.table.weight.data.zero_()
    net.table.weight.data[:, tokenizer.eot] = -1e9  # never ends
    (answer,) = rollouts.written(net, tokenizer, [([0, 1], [])], [1])
    assert len(answer.ids) == context + 1 and not answer.finished
    (answer,) = rollouts.written(net, tokenizer, [([0, 1], [])], [1], readable=5)
    assert len(answer.ids) == 5, "a reward model reads the last token, too"
    tokens, targets = rollouts.sequences([answer], [2], context)
    assert tokens[0, :4].tolist() == answer.ids[:4] and targets[0, 1:4].tolist() == answer.ids[2:]


def test_advantages_are_the_sums_of_what_was_not_expected() -> None:
    check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_one_is_found(mutant: Mutant) -> None:
    with broken(mutant), pytest.raises(AssertionError):
        check()
