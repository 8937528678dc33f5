"""Answers in OpenAI's shape: whole, and in pieces as events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from lm.serving.calls import Call
from lm.serving.worker import Job, Piece, Token, finite
from lm.tokenizers import Tokenizer

DONE = b"data: [DONE]\n\n"
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Names:
    r"""How tokens are written in answers: as text, or `bytes:\xe2` where they are part of a character.

    Args:
        tokenizer: Whose tokens.
        special: Names of tokens that stand for no text, and their ids.
    """

    def __init__(self, tokenizer: Tokenizer, special: dict[str, int]) -> None:
        self._bytes = tokenizer.token_bytes()
        self._special = {i: name for name, i in special.items()}

    def bytes(self, token: int) -> bytes:
        """Return a token's bytes."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def __call__(self, token: int) -> str:
        """Return a token as text; each has one of its own."""
        found = self.bytes(token)
        if not found:
            return self._special.get(token, f"<{token}>")
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class Shape:
    """What is common to both kinds of answers.

    Args:
        call: The request.
        names: How tokens are written.
        prompt_tokens: How many the prompts have.
    """

    whole_object = part_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, call: Call, names: Names, prompt_tokens: int) -> None:
        self.call, self.names, self.prompt_tokens = call, names, prompt_tokens
        self._common = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}

    def usage(self, tokens: int) -> dict[str, int]:
        """Return the numbers of tokens: of prompts, each once, and all that were made."""
        both = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": both}

    def answer(self, choices: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """Return a whole answer."""
        about = {**self._common, "object": self.whole_object, "model": self.call.model}
        return {**about, "choices": choices, "usage": self.usage(tokens)}

    def event(self, choices: list[dict[str, Any]], tokens: int | None = None) -> bytes:
        """Return a piece of an answer as an event; the last one, where the client asked for it, counts tokens."""
        body: dict[str, Any] = {**self._common, "object": self.part_object, "model": self.call.model}
        body["choices"] = choices
        if self.call.include_usage:
            body["usage"] = None if tokens is None else self.usage(tokens)
        return event(body)

    def choice(self, index: int, text: str, tokens: list[Token], finished: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        return {"index": index, "text": text, "logprobs": self.logprobs(tokens), "finish_reason": finished}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what an answer's stream begins with, for each choice."""
        return None

    def part(self, index: int, text: str, tokens: list[Token], finished: str | None) -> dict[str, Any]:
        """Return a piece of a choice."""
        return self.choice(index, text, tokens, finished)

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        """Return log-probabilities; the text's own tokens are always among the likeliest."""
        if self.call.logprobs is None:
            return None
        own = [None if token.logprob > 0 else finite(token.logprob) for token in tokens]  # a text's first has none
        return {
            "text_offset": [token.start for token in tokens],
            "token_logprobs": own,
            "tokens": [self.names(token.id) for token in tokens],
            "top_logprobs": [
                None
                if one is None
                else {self.names(i): finite(x) for i, x in {**token.likeliest, token.id: one}.items()}
                for token, one in zip(tokens, own, strict=True)
            ],
        }


class ChatShape(Shape):
    """A chat's answers."""

    whole_object, part_object = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, text: str, tokens: list[Token], finished: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": finished}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the part that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, text: str, tokens: list[Token], finished: str | None) -> dict[str, Any]:
        """Return a piece of a choice."""
        delta = {"content": text} if text or not finished else {}
        return {"index": index, "delta": delta, "logprobs": self.logprobs(tokens), "finish_reason": finished}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        """Return log-probabilities, of the likeliest tokens as many as were asked for."""
        if self.call.logprobs is None:
            return None
        content = [{**self._told(t.id, t.logprob), "top_logprobs": self._likeliest(t)} for t in tokens]
        return {"content": content, "refusal": None}

    def _likeliest(self, token: Token) -> list[dict[str, Any]]:
        return [self._told(i, logprob) for i, logprob in token.likeliest.items()]

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.names(token), "logprob": finite(logprob), "bytes": list(self.names.bytes(token))}


def event(body: dict[str, Any]) -> bytes:
    """Return a JSON object as a server-sent event."""
    return b"data: " + ENCODER.encode(body).encode() + b"\n\n"


class Texts:
    """The texts of a job as they grow, and what was echoed before each.

    Args:
        echoes: For each prompt, its text and tokens to put before the continuations; empty where none are.
        each: Texts for each prompt.
    """

    def __init__(self, echoes: list[tuple[str, list[Token]]], each: int) -> None:
        self.each = each
        self.echoes = [echo for echo in echoes for _ in range(each)]
        self.texts = [text for text, _ in self.echoes]
        self.tokens = [list(tokens) for _, tokens in self.echoes]
        self.counts = [0] * len(self.echoes)
        self.finished: list[str | None] = [None] * len(self.echoes)
        self.scores = [0.0] * len(self.echoes)

    def add(self, piece: Piece) -> list[Token]:
        """Add a piece; return its tokens, placed after what was echoed."""
        i = piece.index
        before = len(self.echoes[i][0])
        tokens = [token._replace(start=token.start + before) for token in piece.tokens]
        self.texts[i] += piece.text
        self.tokens[i] += tokens
        self.counts[i], self.finished[i], self.scores[i] = piece.count, piece.finished, piece.score
        return tokens

    def best(self, n: int) -> list[int]:
        """Return for each prompt its n likeliest texts, by the mean log-probability of their tokens."""
        firsts = range(0, len(self.texts), self.each)
        ranked = [sorted(range(first, first + self.each), key=lambda i: -self.scores[i]) for first in firsts]
        return [i for one in ranked for i in one[:n]]


async def whole(shape: Shape, texts: Texts, job: Job | None) -> dict[str, Any]:
    """Return the answer of a job, when all of its texts have ended; of none, the prompts alone."""
    while job is not None and None in texts.finished:
        for piece in await job.pieces():
            texts.add(piece)
    call = shape.call
    chosen = texts.best(call.n) if call.best_of > call.n else range(len(texts.texts))
    choices = [
        shape.choice(index, texts.texts[i], texts.tokens[i], texts.finished[i] or "length")
        for index, i in enumerate(chosen)
    ]
    return shape.answer(choices, sum(texts.counts))


async def events(shape: Shape, texts: Texts, job: Job | None) -> AsyncIterator[bytes]:
    """Yield the answer in events, as its pieces come; what has gathered while one was sent goes out together."""
    for i, (echo, tokens) in enumerate(texts.echoes):
        if opening := shape.opening(i):
            yield shape.event([opening])
        if echo or tokens or job is None:
            yield shape.event([shape.part(i, echo, tokens, None if job is not None else "length")])
    while job is not None and None in texts.finished:
        gathered: dict[int, tuple[str, list[Token], str | None]] = {}
        for piece in await job.pieces():
            text, told, _ = gathered.get(piece.index, ("", [], None))
            gathered[piece.index] = text + piece.text, told + texts.add(piece), piece.finished
        news = [
            shape.event([shape.part(i, text, told, finished)])
            for i, (text, told, finished) in gathered.items()
            if text or told or finished
        ]
        if news:
            yield b"".join(news)
    if shape.call.include_usage:
        yield shape.event([], sum(texts.counts))
    yield DONE
