"""An engine in a thread of its own, and what the event loop hands to it and gets from it.

Only the thread touches the engine and its texts; only the event loop touches jobs. Between them go functions to the
thread, and after each step one list of pieces back.
"""

import asyncio
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lm import log
from lm.errors import CommandError, as_user_error, described
from lm.generation.engine import Engine, Request, Text
from lm.generation.sampling import Reading
from lm.models import GPT
from lm.serving.errors import ApiError
from lm.serving.metrics import Metrics
from lm.tokenizers import Tokenizer

Result = TypeVar("Result")


class Token(NamedTuple):
    """A token of an answer: its id, its log-probability, those of the likeliest, and where it begins in the text."""

    id: int
    logprob: float
    likeliest: dict[int, float]
    start: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step has added to a text of a job.

    Args:
        index: Which text.
        text: What was added.
        tokens: Those of it, where log-probabilities were asked for.
        count: How many tokens the text has by now.
        finished: Why the text has ended; None where it goes on.
        score: The mean log-probability of an ended text's tokens, where they were asked for.
    """

    index: int
    text: str
    tokens: list[Token]
    count: int
    finished: str | None
    score: float


class Job:
    """The texts of one request, seen from the event loop.

    Args:
        number: How many texts.
    """

    def __init__(self, number: int) -> None:
        self.open, self.begins, self.has_begun = number, time.monotonic(), False
        self.error: ApiError | None = None
        self.texts: list[Text] = []  # the thread's
        self.told: dict[Text, tuple[int, int]] = {}  # the thread's: tokens and characters that went to the loop
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()

    def take(self, piece: Piece) -> None:
        """Take a piece; it is kept until it is asked for."""
        self._pieces.append(piece)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End the job with an error."""
        self.error, self.open = error, 0
        self._news.set()

    async def pieces(self) -> list[Piece]:
        """Wait for pieces; return all that have come since the last call.

        Raises:
            ApiError: The job has failed.
        """
        await self._news.wait()
        self._news.clear()
        if self.error is not None:
            raise self.error
        pieces, self._pieces = self._pieces, []
        return pieces


class Worker:
    """Continues requests by one network.

    Args:
        name: The checkpoint's.
        net: Its network, in eval mode.
        tokenizer: Its tokenizer.
        slots: Most texts at once; others wait.
        metrics: Counts what is done.
    """

    def __init__(self, name: str, net: nn.Module, tokenizer: Tokenizer, *, slots: int, metrics: Metrics) -> None:
        self.name, self.net, self.tokenizer, self.metrics = name, net, tokenizer, metrics
        self.engine = Engine(net, tokenizer, slots=slots)
        self.context: int | None = self.engine.block_size if isinstance(net, GPT) else None
        """Longest prompt; None where the network reads but the last few tokens of any."""
        self.created = int(time.time())
        self.jobs: set[Job] = set()
        self.alive = True
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[Text, Job] = {}
        self._thread = threading.Thread(target=self._work, name=f"engine of {name}", daemon=True)

    def start(self) -> None:
        """Start the thread; to be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    # -- called in the event loop

    def submit(self, requests: Sequence[Request]) -> Job:
        """Take the requests for a job's texts."""
        job = Job(len(requests))
        self.jobs.add(job)
        self._tasks.put(lambda: self._submit(job, requests))
        return job

    def cancel(self, job: Job) -> None:
        """End a job's texts before the next step; what they hold is free then."""
        if job in self.jobs:
            self.jobs.discard(job)
            self.metrics.cancelled.labels(self.name).inc()
            self._tasks.put(lambda: self._cancel(job))

    def end_all(self, error: ApiError) -> None:
        """End all jobs with an error."""
        for job in list(self.jobs):
            self.cancel(job)
            job.fail(error)

    async def compute(self, function: Callable[[], Result]) -> Result:
        """Return what a function returns, called in the thread between two steps."""
        future: Future[Result] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(_failure(error))

        self._tasks.put(call)
        return await asyncio.wrap_future(future)

    async def prompt_logprobs(self, ids: list[int], most: int) -> list[Token]:
        """Return the tokens of a prompt but its first, with log-probabilities; they begin nowhere."""
        return await self.compute(lambda: prompt_tokens(self.net, ids, most, self.engine.device))

    def _take(self, news: list[tuple[Job, Piece | ApiError]]) -> None:
        for job, piece in news:
            if job not in self.jobs:
                continue
            if isinstance(piece, ApiError):
                job.fail(piece)
            else:
                self._time(job, piece)
                job.take(piece)
            if not job.open:
                self.jobs.discard(job)

    def _time(self, job: Job, piece: Piece) -> None:
        seconds = time.monotonic() - job.begins
        if not job.has_begun:
            job.has_begun = True
            self.metrics.first.labels(self.name).observe(seconds)
        job.open -= piece.finished is not None
        if not job.open:
            self.metrics.whole.labels(self.name).observe(seconds)

    # -- called in the thread

    def _work(self) -> None:
        try:
            while True:
                while not self.engine.busy or not self._tasks.empty():
                    self._tasks.get()()
                self._tell(self._step())
        finally:
            self.alive = False

    def _submit(self, job: Job, requests: Sequence[Request]) -> None:
        try:
            for request in requests:
                text = self.engine.submit(request)
                job.texts.append(text)
                job.told[text] = 0, 0
                self._jobs[text] = job
        except Exception as error:
            self._cancel(job)
            self._tell([(job, _failure(error))])

    def _cancel(self, job: Job) -> None:
        for text in job.texts:
            self.engine.cancel(text)
            self._jobs.pop(text, None)

    def _step(self) -> list[tuple[Job, Piece | ApiError]]:
        began = time.monotonic()
        try:
            grown = self.engine.step()
        except Exception as error:  # memory, or numbers that are not finite: whoever is in work has lost
            failed, failure = {self._jobs[text] for text in self.engine.running}, _failure(error)
            for job in failed:
                self._cancel(job)
            return [(job, failure) for job in failed]
        news: list[tuple[Job, Piece | ApiError]] = [
            (self._jobs[text], self._piece(self._jobs[text], text)) for text in grown if text in self._jobs
        ]
        for text in grown:
            if text.finished:
                self._jobs.pop(text, None)
        self.metrics.step(self.name, len(grown), time.monotonic() - began)
        return news

    def _piece(self, job: Job, text: Text) -> Piece:
        new, (told, shown) = text.take(), job.told[text]
        shown += len(new)
        tokens = []
        while text.request.logprobs is not None and told < len(text.tokens) and text.starts[told] < shown:
            if text.tokens[told] not in self.tokenizer.stops or not text.finished:
                tokens.append(Token(text.tokens[told], *text.logprobs[told], text.starts[told]))
            told += 1
        job.told[text] = told, shown
        score = sum(own for own, _ in text.logprobs) / len(text.tokens) if text.finished and text.logprobs else 0.0
        return Piece(job.texts.index(text), new, tokens, len(text.tokens), text.finished, score)

    def _tell(self, news: list[tuple[Job, Piece | ApiError]]) -> None:
        if news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, news)


def _failure(error: Exception) -> ApiError:
    """Return what a client learns of an error in the thread; what nobody foresaw is written to standard error."""
    known = error if isinstance(error, CommandError) else as_user_error(error)
    if known is not None:
        return ApiError(str(known), status=500)
    print(log.line(f"internal error: {described(error)}", level="error"), file=sys.stderr, flush=True)
    if os.environ.get("LM_DEBUG"):
        traceback.print_exception(error)
    return ApiError("internal error: the server's log has it", status=500)


@torch.inference_mode()
def prompt_tokens(net: nn.Module, ids: list[int], most: int, device: torch.device) -> list[Token]:
    """Return the tokens of a text but its first, each with its log-probability and the likeliest ones'."""
    text = torch.tensor([ids], device=device)  # (1, T)
    if isinstance(net, GPT) and len(ids) <= net.block_size:
        logits = net(text)[0, :-1].float().cpu()  # (T - 1, V)
    else:
        reading = Reading(net)
        rows = [reading.logits(text[:, :i]) for i in range(1, len(ids))]
        logits = torch.cat(rows) if rows else torch.zeros(0, int(net.vocab_size))  # type: ignore[arg-type]
    logs: Tensor = logits.log_softmax(-1)
    likeliest = logs.topk(min(most, logs.shape[1]))
    rows_of: Any = zip(ids[1:], logs, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [Token(i, float(row[i]), dict(zip(top, values, strict=True)), 0) for i, row, top, values in rows_of]


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold: OpenAI's own least one for what has no probability."""
    return logprob if math.isfinite(logprob) else -9999.0
