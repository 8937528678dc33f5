"""Speculative decoding: cheap guesses at the next tokens, checked by the network all at once.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023). A guess x, drawn with probability
q(x), is kept with probability min(1, p(x) / q(x)), where p is the network's; else a token is drawn from what p has
above q, max(0, p - q), normalised. The text is then distributed as if each token had been drawn from p, and at
temperature 0 it is the same text.

Shapes: T time, K guesses, V vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lm.errors import CheckError, UserError
from lm.generation.sampling import Sampler, generate
from lm.models import GPT
from lm.models.cache import Cache


class Draft(Protocol):
    """Guesses how a text goes on."""

    def guess(self, text: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return at most `most` next tokens of text (1, T): int64 (K,), and what each was drawn from, (K, V)."""


class SmallerNetwork:
    """Guesses by a smaller network of the same vocabulary.

    Args:
        net: The network, in eval mode.
        sampler: Chooses its guesses; the more alike both networks' probabilities, the more are kept.
        generator: Its random numbers.
    """

    def __init__(self, net: GPT, sampler: Sampler, generator: torch.Generator) -> None:
        self.net, self.sampler, self.generator = net, sampler, generator
        self.cache = Cache(net.block_size)

    def guess(self, text: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """See `Draft`; none where the text is as long as the smaller network's context."""
        guesses, drawn_from = [], []
        for _ in range(min(most, self.net.block_size - text.shape[1])):
            logits = _read(self.net, self.cache, text)[-1:]  # (1, V)
            drawn_from.append(self.sampler.probabilities(logits, text.cpu()))
            guesses.append(torch.multinomial(drawn_from[-1], 1, generator=self.generator))  # (1, 1)
            text = torch.cat([text, guesses[-1].to(text.device)], dim=1)
        if not guesses:
            return _nothing(self.net.vocab_size)
        return torch.cat(guesses).squeeze(1), torch.cat(drawn_from)


class Repetition:
    """Guesses that a text goes on as it did where its last tokens stood before; costs nothing.

    Args:
        vocab_size: V.
        longest: Most tokens that are looked for; fewer where those do not stand there twice.
    """

    def __init__(self, vocab_size: int, longest: int = 3) -> None:
        self.vocab_size, self.longest = vocab_size, longest

    def guess(self, text: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """See `Draft`; none where nothing stands there twice."""
        tokens = text[0].cpu()
        for size in range(min(self.longest, len(tokens) - 1), 0, -1):
            places = (tokens.unfold(0, size, 1)[:-1] == tokens[-size:]).all(1).nonzero()  # where the last ones stood
            if len(places):
                after = int(places[-1]) + size
                guesses = tokens[after : after + most]
                return guesses, torch.nn.functional.one_hot(guesses, self.vocab_size).float()
        return _nothing(self.vocab_size)


@torch.inference_mode()
def speculate(
    net: GPT, prompt: Tensor, draft: Draft, *, sampler: Sampler, generator: torch.Generator, ahead: int = 4
) -> Iterator[int]:
    """Yield the next tokens of one text, without end; nothing is guessed where it is longer than the context.

    Args:
        net: The network, in eval mode.
        prompt: int64 (1, T), T at least 1.
        draft: Guesses.
        sampler: Chooses among the network's logits.
        generator: Its random numbers, on the CPU.
        ahead: Most guesses at a time, K.

    Raises:
        UserError: The draft has another vocabulary.
        CheckError: A logit is not finite.
    """
    text, cache = prompt, Cache(net.block_size)
    while text.shape[1] <= net.block_size:
        guesses, drawn_from = draft.guess(text, min(ahead, net.block_size - text.shape[1]))  # (K,), (K, V)
        if drawn_from.shape[1] != net.vocab_size:
            raise UserError(f"the draft has {drawn_from.shape[1]} symbols, the network {net.vocab_size}: use its own")
        guessed = torch.cat([text, guesses[None].to(text.device)], dim=1)  # (1, T + K)
        logits = _read(net, cache, guessed)[-len(guesses) - 1 :]  # (K + 1, V)
        for i in range(len(guesses) + 1):
            p = sampler.probabilities(logits[i : i + 1], guessed[:, : text.shape[1]].cpu())[0]  # (V,)
            token = int(guesses[i]) if i < len(guesses) else -1
            kept = token >= 0 and float(torch.rand((), generator=generator)) * drawn_from[i, token] < p[token]
            if not kept:
                rest = (p - drawn_from[i]).clamp(min=0) if token >= 0 else p
                token = int(torch.multinomial(rest if rest.sum() > 0 else p, 1, generator=generator))
            text = torch.cat([text, torch.tensor([[token]], device=text.device)], dim=1)
            yield token
            if not kept:
                break
        cache.cut(min(cache.length, text.shape[1] - 1))
    yield from (int(token) for token in generate(net, text, sampler=sampler, generator=generator))


def _read(net: GPT, cache: Cache, text: Tensor) -> Tensor:
    """Return the logits after each token of text (1, T) that the cache lacks, (t, V); drop what it has beyond."""
    known = 0
    if cache.tokens is not None:
        same = cache.tokens[0, : text.shape[1] - 1] == text[0, : min(cache.length, text.shape[1] - 1)]
        known = int(same.cumprod(0).sum())
    cache.cut(known)
    logits: Tensor = net(text[:, known:], cache)[0].float().cpu()
    if not logits.amax().isfinite():
        raise CheckError("the network's output is not finite: its weights are too large or damaged: use another")
    return logits


def _nothing(vocab_size: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0, vocab_size)
