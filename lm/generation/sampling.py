"""Sampling: from a network's logits to text, a token at a time.

Shapes: B samples, T time, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm import bounds
from lm.errors import CheckError, UserError
from lm.models.cache import Cache
from lm.tokenizers import Tokenizer

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Chooses the next token.

    Args:
        temperature: Divides the logits; below 1 likely tokens become likelier, 0 always takes the likeliest.
        top_k: Only the k likeliest tokens can be chosen.
        top_p: Only the fewest likeliest tokens that together have this probability (Holtzman et al., 2019).
        min_p: Only tokens at least this fraction as probable as the likeliest (Nguyen et al., 2024).
        repetition_penalty: Above 1, tokens already in the text become less likely (Keskar et al., 2019).

    Raises:
        UserError: A value is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        bounds.check(vars(self), "lm.Sampler", "", UserError)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the probability of each token.

        Args:
            logits: (B, V).
            seen: int64 (B, T), the text so far, which only a repetition_penalty asks for.

        Returns:
            (B, V), rows that sum to 1.
        """
        if self.repetition_penalty != 1:
            assert seen is not None
            old = logits.gather(1, seen)  # (B, T)
            new = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
            logits = logits.scatter(1, seen, new).nan_to_num()  # a tiny penalty makes infinities
        if self.temperature < TINY:  # 32 bits hold no smaller one
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # never above 0: no overflow
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is None and self.min_p is None:
            return probabilities
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of all that are likelier; 0 for the likeliest
            out = before >= self.top_p
            out[:, 0] = False  # the likeliest stays, also where 32 bits round top_p to 0
            probabilities = probabilities.masked_fill(out.scatter(1, order, out), 0)
        if self.min_p is not None:
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        return probabilities / probabilities.cumsum(-1)[:, -1:]  # sum(-1) would round a single row otherwise than many


def choose(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return the token of each row whose part of the probabilities, laid end to end, has the row's random number.

    torch.multinomial draws a number for each token of the vocabulary; this takes one for each row, and gives a row the
    same token whatever the others are.

    Args:
        probabilities: (B, V), not negative; a row's sum need not be 1.
        draws: float64 (B, 1), at least 0 and below 1.

    Returns:
        int64 (B, 1); never a token of probability 0.
    """
    ends = probabilities.double().cumsum(-1)  # (B, V)
    return torch.searchsorted(ends, draws * ends[:, -1:], right=True)


class Reading:
    """Reads a batch of texts that grow; a network that takes a cache reads each token once, within its context.

    Args:
        net: A network of `lm.models`, in eval mode.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.block_size = net, int(net.block_size)  # type: ignore[arg-type]
        takes_cache = "cache" in inspect.signature(net.forward).parameters
        self._cache, self._read = Cache(self.block_size, last=1) if takes_cache else None, 0

    def logits(self, text: Tensor) -> Tensor:
        """Return the logits (B, V) after texts (B, T), which begin with those of the call before.

        Raises:
            CheckError: A logit is not finite.
        """
        first, new, self._read = not self._read, text[:, self._read :], text.shape[1]
        logits: Tensor  # (B, T, V) or (B, V)
        if self._cache is None or text.shape[1] > self.block_size:
            logits = self.net(text[:, -self.block_size :])
        elif first and min(text.shape) > 1 and bool((text == text[0]).all()):  # samples of a prompt, which is read once
            logits = self.net(text[:1], self._cache)
            self._cache.repeat(len(text))
        else:
            logits = self.net(new, self._cache)
        logits = (logits[:, -1] if logits.ndim == 3 else logits).float().cpu().expand(len(text), -1)  # (B, V)
        if not logits.amax().isfinite():  # NaN is the largest of all
            raise CheckError("the network's output is not finite: its weights are too large or damaged: use another")
        return logits


@torch.inference_mode()
def generate(net: nn.Module, prompt: Tensor, *, sampler: Sampler, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the next token of every sample, without end.

    Only the last block_size tokens are read, so prompts and texts may be longer. A network that takes a cache reads
    each token once, until the text is longer than that: then all positions move with each token, and what was kept of
    them is of no use. The network is used as it is: put it in eval mode.

    Args:
        net: A network of `lm.models`.
        prompt: int64 (B, T), T at least 1.
        sampler: Chooses among the logits.
        generator: Its random numbers; the global generator is not used. On the CPU, so that a seed gives the same text
            on every device that computes the same logits.

    Yields:
        int64 (B,).

    Raises:
        CheckError: A logit is not finite.
    """
    text, reading = prompt, Reading(net)
    while True:
        logits = reading.logits(text)  # (B, V)
        probabilities = sampler.probabilities(logits, text.cpu())  # (B, V)
        token = choose(probabilities, torch.rand(len(text), 1, dtype=torch.float64, generator=generator))  # (B, 1)
        text = torch.cat([text, token.to(text.device)], dim=1)
        yield token.squeeze(1)


def start_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt; for an empty one, a token to start from: end-of-text, a newline, or the first id.

    Raises:
        UserError: The vocabulary lacks a symbol of the prompt.
    """
    if prompt:
        ids = tokenizer.encode(prompt).tolist()
        return [tokenizer.eot, *ids] if tokenizer.begins_with_eot and tokenizer.eot is not None else ids
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    table = tokenizer.token_bytes()
    return [table.index(b"\n") if b"\n" in table else 0]


class TextStream:
    """Turns one sample's tokens into text as they come: whole characters, without any part of a stop string.

    Args:
        tokenizer: Gives the bytes of each token.
        stops: Strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text = ""  # decoded so far
        self.shown = 0  # characters of it that were returned
        self.done = False
        self._decoder, self._ends = tokenizer.decoder(), tokenizer.stops

    def add(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        if token in self._ends:
            return self.finish()
        return self._extend(self._decoder.add(token))

    def finish(self) -> str:
        """Take the end of the text; return what was still held back."""
        if self.done:
            return ""
        new = self._extend(self._decoder.finish())
        if not self.done:
            new += self.text[self.shown :]
            self.shown, self.done = len(self.text), True
        return new

    def _extend(self, piece: str) -> str:
        self.text += piece
        # a match can only end in the new piece, but may begin in what was held back: all that is not shown yet
        found = [at for stop in self.stops if (at := self.text.find(stop, self.shown)) >= 0]
        if found:
            self.text, self.done = self.text[: min(found)], True
        certain = len(self.text) - (0 if self.done else self._held_back())
        new, self.shown = self.text[self.shown : certain], max(self.shown, certain)
        return new

    def _held_back(self) -> int:
        """Return the length of the text's longest suffix that is a prefix of a stop string."""
        waiting = self.text[self.shown :]
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        sizes = range(min(longest, len(waiting)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(waiting[-n:]) for stop in self.stops)), 0)
