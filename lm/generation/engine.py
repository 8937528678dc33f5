"""The engine: many requests at once, each as if it were alone.

Requests join and leave between steps. A step reads one piece of one prompt, and then makes a token of each text whose
prompt is read. What a request gets does not depend on what else is there: its rows of each product are computed by the
same instructions (`Engine.rows`), its random numbers are its own, and its prompt is cut at the same places.

Shapes: B rows, T tokens of a piece, V vocabulary.
"""

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm.errors import CheckError, UserError
from lm.generation.sampling import Reading, Sampler, TextStream, choose
from lm.generation.slots import Slots
from lm.models import GPT
from lm.tokenizers import Tokenizer

PIECE = 64
"""Tokens of a prompt that are read at a time: longer ones wait for others' tokens in between."""
ROWS = (4, 8, 16, 32)
"""Numbers of rows that are tried for products whose rows do not depend on how many there are. Not one: a product with a
single row is computed by other instructions, which shows in few of the numbers."""

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to be continued.

    Args:
        prompt: Its ids, at least one.
        sampler: Chooses the tokens.
        seed: Of the random choices, which are its own.
        max_new_tokens: Longest continuation.
        stop: Strings that end it; they are not part of it.
        logprobs: For each new token, of how many likeliest tokens the log-probability is kept beside its own; None for
            none, not even its own. They are the network's: neither samplers nor what follows change them.
        logit_bias: Ids, and what is added to their logits; an id stands there once.
        presence_penalty: Subtracted from the logit of each token that the continuation has.
        frequency_penalty: Subtracted from it as often as the continuation has it.
    """

    prompt: Sequence[int]
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt has no tokens: give it one to start from")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if isinstance(self.stop, str):
            raise UserError(f"stop is {self.stop!r}: give a tuple of strings")
        if "" in self.stop:
            raise UserError("stop has an empty string, which would stop every text at once: leave it out")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError(f"logprobs is {self.logprobs}: it must be at least 0, or None for none")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}: it must fit into 64 bits")

    @property
    def follows_its_text(self) -> bool:
        """Whether the choice of a token depends on those before, other than through the network."""
        return self.sampler.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


class Text:
    """A request in work, and what has come of it.

    Attributes:
        tokens: Its new tokens so far.
        logprobs: If asked for, each new token's log-probability, and those of the likeliest ones by their ids.
        starts: Where each new token begins in the continuation, in characters.
        finished: Why it has ended: "stop" at a stop string or the end of text, "length", or "cancelled"; None where it
            goes on.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request, self.tokens, self.starts = request, list[int](), list[int]()
        self.logprobs: list[tuple[float, dict[int, float]]] = []
        self.finished: Reason | None = None
        self.slot: int | None = None
        self.read = 0  # tokens of the prompt, but for its last
        self.alone: Reading | None = None  # where it cannot share a step
        self.generator = torch.Generator().manual_seed(request.seed)
        self._stream, self._new = TextStream(tokenizer, list(request.stop)), ""

    @property
    def text(self) -> str:
        """The continuation so far."""
        return self._stream.text[: self._stream.shown]

    def take(self) -> str:
        """Return the text that was added since the last call."""
        new, self._new = self._new, ""
        return new

    def add(self, token: int) -> None:
        """Add a token; the text may end with it."""
        self.tokens.append(token)
        self.starts.append(len(self._stream.text))
        self._new += self._stream.add(token)
        if self._stream.done:
            self.finished = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finished = "length"
            self._new += self._stream.finish()


class Engine:
    """Continues many texts by one network, as many at once as there are slots; the others wait in order.

    The network is used as it is: put it in eval mode. Networks other than GPT, whose caches are for one text, share no
    step: each text gets its turn. So does a text that has grown beyond the network's context, where the window moves.

    Args:
        net: A network of `lm.models`.
        tokenizer: Its own.
        slots: Most texts at once.
        piece: Tokens of a prompt that are read at a time.
    """

    def __init__(self, net: nn.Module, tokenizer: Tokenizer, *, slots: int = 16, piece: int = PIECE) -> None:
        if slots < 1 or piece < 1:
            raise UserError(f"slots is {slots}, piece is {piece}: both must be at least 1")
        self.net, self.tokenizer, self.slots, self.piece = net, tokenizer, slots, piece
        self.block_size: int = net.block_size  # type: ignore[assignment]
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []
        self.device = next(net.parameters()).device
        self.together = isinstance(net, GPT)
        self.rows = steady_rows(net, slots) if self.together else 1
        """Texts that are read at once are rounded up to a multiple of it: then no row depends on how many there are."""
        number = -(-slots // self.rows) * self.rows
        self.cache = Slots(number, self.block_size, self.device) if self.together else None
        if self.cache is not None:  # take all memory now
            self.cache.select(slice(0, self.rows))
            self._forward(torch.zeros(self.rows, 1, dtype=torch.int64, device=self.device))
        self._free = list(range(slots))
        self._prompts: dict[int, list[int]] = {}  # what each slot has read of its prompt, kept when it is free again

    # -- requests

    def submit(self, request: Request) -> Text:
        """Take a request; it waits for a free slot.

        Raises:
            UserError: Its prompt has an id that the network does not know.
        """
        vocab_size = int(self.net.vocab_size)  # type: ignore[arg-type]
        unknown = [token for token in request.prompt if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(f"the prompt has the id {unknown[0]}: ids are at least 0 and below {vocab_size}")
        text = Text(request, self.tokenizer)
        self.waiting.append(text)
        return text

    def cancel(self, text: Text) -> None:
        """End a text at once, and free what it holds."""
        if text.finished is None:
            text.finished = "cancelled"
        if text in self.waiting:
            self.waiting.remove(text)
        self._leave()

    @property
    def memory(self) -> int:
        """Bytes that the texts' caches have taken, and will never exceed; 0 where each text has a cache of its own."""
        return self.cache.bytes if self.cache is not None else 0

    @property
    def busy(self) -> bool:
        """Whether a request waits or is in work."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Read a piece of a prompt, and make a token of each text that is ready; return the texts that got one.

        Raises:
            CheckError: A logit is not finite.
        """
        self._admit()
        self._read_prompt()
        ready = [text for text in self.running if self._ready(text)]
        alone = [(text, text.alone) for text in self.running if text.alone is not None]
        grown = self._decode(ready) if ready else []
        for text, reading in alone:
            so_far = torch.tensor([[*text.request.prompt, *text.tokens]], device=self.device)  # (1, T)
            self._choose([text], reading.logits(so_far))
            grown.append(text)
        self._leave()
        if not self.waiting:
            self._close_gaps()
        return grown

    def run(self, requests: Sequence[Request]) -> list[Text]:
        """Continue all of some texts; return them in their order."""
        texts = [self.submit(request) for request in requests]
        while self.busy:
            self.step()
        return texts

    # -- a step

    def _admit(self) -> None:
        while self.waiting and self._free:
            text = self.waiting.popleft()
            text.slot = self._free.pop(0)
            self.running.append(text)
            if self.cache is None or len(text.request.prompt) > self.block_size:
                text.alone = Reading(self.net)
            else:
                self.cache.lengths[text.slot] = 0
                self._prompts[text.slot] = []

    def _read_prompt(self) -> None:
        """Read a piece of the first prompt that is not read yet; its last token is read with the others' tokens."""
        text = next((one for one in self.running if one.alone is None and not self._ready(one)), None)
        if text is None:
            return
        assert self.cache is not None and text.slot is not None
        prompt = list(text.request.prompt[:-1])
        if not text.read:
            self._share(text, prompt)
        part = prompt[text.read : text.read + self.piece]
        width = min(-(-len(part) // self.rows) * self.rows, self.block_size - text.read)
        if part:
            tokens = torch.tensor([part + [0] * (width - len(part))], device=self.device)  # (1, T)
            self.cache.select(slice(text.slot, text.slot + 1))
            self._forward(tokens)
        text.read += len(part)
        self.cache.lengths[text.slot] = text.read
        self._prompts[text.slot] = prompt[: text.read]

    def _share(self, text: Text, prompt: list[int]) -> None:
        """Copy the pieces that another slot has read of the same prompt; all, where it is of another sample."""
        assert self.cache is not None and text.slot is not None

        def common(other: list[int]) -> int:
            if other == prompt:  # the last piece, too, has been cut at the same place
                return len(prompt)
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))
            return sum(1 for _ in same) // self.piece * self.piece

        slot, length = max(((slot, common(other)) for slot, other in self._prompts.items()), key=lambda pair: pair[1])
        if length:
            self.cache.copy(slot, text.slot, length)
            text.read = length

    def _decode(self, texts: list[Text]) -> list[Text]:
        """Make a token of each."""
        assert self.cache is not None
        slots = [text.slot for text in texts if text.slot is not None]  # all have one
        stop = -(-(max(slots) + 1) // self.rows) * self.rows
        last = torch.zeros(stop, 1, dtype=torch.int64)
        for text in texts:
            last[text.slot] = text.tokens[-1] if text.tokens else text.request.prompt[-1]
        self.cache.select(slice(0, stop), slots)
        logits = self._forward(last.to(self.device))[:, -1]  # (B, 1) -> (B, V)
        self.cache.lengths[slots] += 1
        self._choose(texts, logits[slots])
        return texts

    @torch.inference_mode()
    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens, self.cache)
        return logits

    def _choose(self, texts: list[Text], logits: Tensor) -> None:
        """Add a token to each text, by its own sampler and generator, from logits (B, V)."""
        logits = logits.float().cpu()
        if not logits.amax().isfinite():  # NaN is the largest of all
            raise CheckError("the network's output is not finite: its weights are too large or damaged: use another")
        for text, row, token in zip(texts, logits, self._draw(texts, logits), strict=True):
            if text.request.logprobs is not None:
                logs = row.log_softmax(0)  # (V,)
                likeliest = logs.topk(min(text.request.logprobs, len(logs)))
                text.logprobs.append(
                    (float(logs[token]), dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)))
                )
            text.add(token)
            grown = len(text.request.prompt) + len(text.tokens)
            if grown > self.block_size and text.alone is None and text.finished is None:
                text.alone = Reading(self.net)

    def _draw(self, texts: list[Text], logits: Tensor) -> list[int]:
        """Return a token of each text, from logits (B, V); texts of equal samplers are drawn together."""
        groups: dict[Any, list[int]] = {}
        for i, text in enumerate(texts):
            request = text.request
            own = request.follows_its_text or request.logit_bias
            groups.setdefault(text if own else request.sampler, []).append(i)
        tokens = torch.empty(len(texts), 1, dtype=torch.int64)
        for members in groups.values():
            first = texts[members[0]]
            rows, seen = logits[members], None  # (b, V)
            if first.request.follows_its_text or first.request.logit_bias:
                rows, seen = _adjusted(first, rows), torch.tensor([[*first.request.prompt, *first.tokens]])  # (1, T)
            probabilities = first.request.sampler.probabilities(rows, seen)  # (b, V)
            draws = [torch.rand(1, 1, dtype=torch.float64, generator=texts[i].generator) for i in members]
            tokens[members] = choose(probabilities, torch.cat(draws))
        return tokens.squeeze(1).tolist()

    def _ready(self, text: Text) -> bool:
        return text.alone is None and text.read == len(text.request.prompt) - 1

    def _leave(self) -> None:
        for text in [one for one in self.running if one.finished]:
            self.running.remove(text)
            assert text.slot is not None
            self._free = sorted([*self._free, text.slot])
            text.alone = None

    def _close_gaps(self) -> None:
        """Move texts to the first slots, so that a step reads fewer rows."""
        for text in sorted(self.running, key=lambda text: -(text.slot or 0)):
            assert text.slot is not None
            if not self._free or self._free[0] > text.slot:
                break
            old, text.slot = text.slot, self._free.pop(0)
            if self.cache is not None:
                self.cache.copy(old, text.slot, int(self.cache.lengths[old]))
                self._prompts[text.slot] = self._prompts.pop(old, [])
            self._free = sorted([*self._free, old])


def _adjusted(text: Text, logits: Tensor) -> Tensor:
    """Return a text's logits (1, V) with what its request adds and subtracts."""
    request = text.request
    change = {
        token: -request.presence_penalty - n * request.frequency_penalty for token, n in Counter(text.tokens).items()
    }
    for token, bias in request.logit_bias:
        change[token] = change.get(token, 0) + bias
    if not change:
        return logits
    logits = logits.clone()
    logits[0, list(change)] += torch.tensor(list(change.values()))
    return logits


@torch.inference_mode()
def steady_rows(net: Any, most: int) -> int:
    """Return a number of rows: batches of a multiple of it, at most `most`, give each text the same bits.

    Matrix products of few rows may be computed by other instructions than those of many, which rounds otherwise. It is
    found by trying; where none of the smaller numbers does, it is `most`: all batches are of one size.
    """
    made = torch.Generator().manual_seed(0)
    length = min(3, int(net.block_size))
    tokens = torch.randint(net.vocab_size, (-(-most // max(ROWS)) * max(ROWS), length), generator=made)
    tokens = tokens.to(next(net.parameters()).device)

    def logits(count: int) -> Tensor:
        cache = Slots(count, net.block_size, tokens.device)
        for i in range(length):
            out: Tensor = net(tokens[:count, i : i + 1], cache)  # (B, 1, V)
            cache.lengths += 1
        return out

    whole = logits(len(tokens))
    for rows in ROWS:
        counts = {rows, 2 * rows, 3 * rows, most} if rows < most else set()
        sizes = [count for count in sorted(counts) if count % rows == 0 and count <= len(tokens)]
        if sizes and all(torch.equal(logits(count), whole[:count]) for count in sizes):
            return rows
    return most
