"""Many texts side by side, each by random numbers of its own: what a policy writes to learn from.

The engine serves requests that come at any time; here all prompts are known, so those of one length are read at once.

Shapes: N prompts, B of them of one length, T time, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lm.generation.sampling import Reading, Sampler, choose


@torch.inference_mode()
def continued(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    sampler: Sampler,
    longest: int,
    ends: Collection[int],
    context: int | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt (N lists), with the one that ended it.

    Args:
        net: A network of `lm.models`, in eval mode.
        prompts: In ids.
        seeds: Of each one's random choices.
        sampler: Chooses the tokens.
        longest: Most new tokens; fewer where the context holds no more.
        ends: Tokens that end a text.
        context: Most tokens of a prompt and what follows it; by default one more than the network reads.

    Raises:
        CheckError: A logit is not finite.
    """
    found: list[list[int]] = [[] for _ in prompts]
    context = context or int(net.block_size) + 1  # type: ignore[arg-type]
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        count = max(1, min(longest, context - length))
        text = torch.tensor([list(prompts[i]) for i in places])  # (B, T)
        new = _tokens(net, text, [seeds[i] for i in places], sampler, count, ends)  # (B, at most count)
        for i, row in zip(places, new.tolist(), strict=True):
            stop = next((t for t, token in enumerate(row) if token in ends), len(row))
            found[i] = row[: stop + 1]
    return found


def _tokens(
    net: nn.Module, text: Tensor, seeds: Sequence[int], sampler: Sampler, count: int, ends: Collection[int]
) -> Tensor:
    """Return new tokens of texts (B, T), until all have ended: (B, at most count)."""
    device, length = next(net.parameters()).device, text.shape[1]
    draws = torch.stack([torch.rand(count, dtype=torch.float64, generator=_generator(seed)) for seed in seeds])
    reading, stops = Reading(net), torch.tensor(sorted(ends))
    done = torch.zeros(len(text), dtype=torch.bool)
    for t in range(count):
        probabilities = sampler.probabilities(reading.logits(text.to(device)), text)  # (B, V)
        token = choose(probabilities, draws[:, t : t + 1])  # (B, 1)
        text = torch.cat([text, token], dim=1)
        done |= torch.isin(token.squeeze(1), stops)
        if done.all():
            break
    return text[:, length:]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
