"""Rollouts: what a policy writes of prompts, and what it is worth.

Shapes: B prompts, G answers to each, N = B G texts, T block_size.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.data.chunks import IGNORED
from lm.generation.sampling import Sampler
from lm.generation.side_by_side import continued
from lm.posttraining.rewards import Answer
from lm.tokenizers import Tokenizer

LossMean = Literal["sum", "token", "sequence", "group"]
LOSS_MEANS = get_args(LossMean)
Prompt = tuple[list[int], list[int]]
"""A prompt and the expected answer, in ids."""


class Experience(NamedTuple):
    """What a step learns from."""

    tokens: Tensor
    """int64 (N, T)."""
    targets: Tensor
    """int64 (N, T): what the policy wrote, IGNORED elsewhere."""
    old: Tensor
    """Log-probabilities by the policy that wrote them (N, T)."""
    advantages: Tensor
    """How much better each token was than expected (N, T)."""
    earned: Tensor
    """What a value network is to expect from a token on (N, T)."""
    weights: Tensor
    """Of the tokens' losses in the step's (N, T)."""
    about: Tensor
    """Of each text its reward, its divergence from the reference, and whether it ended (N, 3)."""


def prompts_of(tokens: Tensor, targets: Tensor) -> list[Prompt]:
    """Return the prompt and the expected answer of each example, in ids.

    Args:
        tokens: int64 (B, T).
        targets: int64 (B, T): the first ones that are not IGNORED are the answer.
    """
    found = []
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        first = next(i for i, one in enumerate(wanted) if one != IGNORED)
        stop = next((i for i in range(first, len(wanted)) if wanted[i] == IGNORED), len(wanted))
        found.append((row[: first + 1], wanted[first:stop]))
    return found


def written(
    net: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    longest: int | None = None,
    readable: int | None = None,
) -> list[Answer]:
    """Return what a policy answers.

    Args:
        net: The policy, in eval mode.
        tokenizer: Its own.
        prompts: And the expected answers, in ids.
        seeds: Of the random choices; as many answers follow each prompt as there are seeds for it.
        longest: Most new tokens; None for what the context holds.
        readable: Most tokens of a prompt and its answer that the reward reads; None for any. The last token of a text
            is one more than the policy reads.
    """
    each = [one for one in prompts for _ in range(len(seeds) // len(prompts))]
    stops, context = tokenizer.stops, int(net.block_size) + 1  # type: ignore[arg-type]
    most = {"longest": longest or context, "context": min(context, readable or context)}
    found = continued(net, [one for one, _ in each], seeds, sampler=Sampler(), ends=stops, **most)

    def said(ids: list[int]) -> str:
        return tokenizer.decode([i for i in ids if i not in stops])

    return [
        Answer(said(prompt), said(new), said(expected), new[-1] in stops, [*prompt, *new])
        for (prompt, expected), new in zip(each, found, strict=True)
    ]


def sequences(answers: Sequence[Answer], starts: Sequence[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, both (N, T), of answers: what the policy wrote is a target.

    Args:
        answers: The texts.
        starts: The length of each one's prompt.
        block_size: T.
    """
    tokens = torch.zeros(len(answers), block_size, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for i, (answer, start) in enumerate(zip(answers, starts, strict=True)):
        ids = torch.tensor(answer.ids)
        tokens[i, : len(ids) - 1] = ids[:-1]
        targets[i, start - 1 : len(ids) - 1] = ids[start:]
    return tokens, targets


def above_mean(rewards: Tensor, group: int, *, scaled: bool) -> Tensor:
    """Return by how much each text's reward is above its group's mean (N,); in standard deviations, if it is scaled.

    Args:
        rewards: (N,), a group's texts one after another.
        group: G.
        scaled: Whether they are divided by the group's standard deviation, as in GRPO (Shao et al., 2024).
    """
    groups: Tensor = rewards.unflatten(0, (-1, group))  # (B, G)
    found = groups - groups.mean(1, keepdim=True)
    if scaled:
        found = found / (groups.std(1, keepdim=True) + 1e-6)
    return found.flatten(0, 1)


def token_rewards(given: Tensor, costs: Tensor, counts: Tensor) -> Tensor:
    """Return what each token earns (N, T): the text's reward comes with its last one, and each has a cost of its own.

    Args:
        given: The texts' rewards (N,).
        costs: The tokens' (N, T).
        counts: Which tokens the policy wrote, bool (N, T).
    """
    last = counts & (counts.cumsum(1) == counts.sum(1, keepdim=True))
    return (last * given.unsqueeze(1) - costs).where(counts, 0.0)


def advantages(rewards: Tensor, values: Tensor, counts: Tensor, decay: float) -> Tensor:
    """Return generalised advantage estimates (N, T), without discount (Schulman et al., 2016).

    A value network expected V_t from token t on. What came of it after one token is r_t + V_{t+1}, so that token was
    better than expected by δ_t = r_t + V_{t+1} - V_t; and A_t = δ_t + λ A_{t+1}, from the last token back. With λ = 1
    the δ add up to all that was earned from t on, less V_t; with λ = 0, only the next value is believed.

    Args:
        rewards: r (N, T).
        values: V (N, T).
        counts: Which tokens the policy wrote, bool (N, T); after the last of them, V and A are 0.
        decay: λ.
    """
    values = values.where(counts, 0.0)
    errors = rewards + F.pad(values[:, 1:], (0, 1)) - values  # (N, T)
    found, sums = [], torch.zeros_like(errors[:, 0])  # (N,)
    for error in errors.unbind(1)[::-1]:
        sums = error + decay * sums
        found.append(sums)
    return torch.stack(found[::-1], dim=1).where(counts, 0.0)


def token_weights(counts: Tensor, group: int, how: LossMean) -> Tensor:
    """Return what each token's loss weighs in the batch's (N, T); libraries differ in it, and say it seldom.

    Args:
        counts: Which tokens the policy wrote, bool (N, T).
        group: G.
        how: sum adds a text's tokens, and takes the mean over texts: the policy gradient itself. token takes the mean
            over all tokens, sequence that over each text's and then over texts: a long text's tokens weigh less. group
            takes the mean over each group's tokens, then over groups.
    """
    weights = counts.to(torch.get_default_dtype())
    if how == "token":
        return weights / weights.sum()
    if how == "sequence":
        weights = weights / weights.sum(1, keepdim=True)
    if how == "group":
        groups = weights.unflatten(0, (-1, group))  # (B, G, T)
        weights = (groups / groups.sum((1, 2), keepdim=True)).flatten(0, 1) * group
    return weights / len(weights)
