"""From a checked call to a job: names of models, limits of the moment, prompts as ids."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm.errors import UserError
from lm.generation.engine import Request
from lm.generation.sampling import start_tokens
from lm.serving.answers import ChatShape, Names, Shape, Texts
from lm.serving.calls import Call, Limits, Prompt
from lm.serving.errors import ApiError
from lm.serving.metrics import Metrics
from lm.serving.templates import Templates, prompt_of
from lm.serving.worker import Job, Token, Worker


class Service:
    """All checkpoints that are served, and what is common to them.

    Args:
        workers: By name.
        limits: Of requests.
        metrics: What the workers count in.
    """

    def __init__(self, workers: list[Worker], limits: Limits, metrics: Metrics) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.limits, self.metrics, self.templates = limits, metrics, Templates()
        self.stopping, self._preparing = False, 0
        self.names = {worker.name: Names(worker.tokenizer, dict(worker.tokenizer.special_ids)) for worker in workers}

    @property
    def well(self) -> bool:
        """Whether requests are answered."""
        return not self.stopping and all(worker.alive for worker in self.workers.values())

    def worker(self, model: str) -> Worker:
        """Return the worker of a model.

        Raises:
            ApiError: There is none of that name.
        """
        if model not in self.workers:
            known = ", ".join(self.workers)
            raise ApiError(
                f"model {model[:80]!r} is not served here: say one of {known}", "model", status=404,
                code="model_not_found",
            )  # fmt: skip
        return self.workers[model]

    def check_room(self) -> None:
        """Refuse a request where too many are in work.

        Raises:
            ApiError: They are, or the server is about to stop.
        """
        if self.stopping:
            raise ApiError("the server is stopping: ask again", status=503, code="stopping", retry_after=5)
        most = self.limits.max_requests
        if self._preparing + sum(len(worker.jobs) for worker in self.workers.values()) >= most:
            text = f"the queue is full, with {most} requests: ask again later"
            raise ApiError(text, status=429, code="queue_full", retry_after=1)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for requests, until there is an answer, or a job, which has a place of its own.

        Raises:
            ApiError: There is none.
        """
        self.check_room()
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def start(self, call: Call) -> tuple[Shape, Texts, Job | None]:
        """Return how a call is answered, and the job that makes its texts; None where only the prompt is wanted.

        Raises:
            ApiError: The call does not suit the model.
        """
        worker = self.worker(call.model)
        with self.place():
            prompts = await self._prompts(worker, call)
            shape = (ChatShape if call.chat else Shape)(call, self.names[call.model], sum(map(len, prompts)))
            texts = Texts([await self._echo(worker, call, i, ids) for i, ids in enumerate(prompts)], call.best_of)
            requests = self._requests(worker, call, prompts)
            if call.max_tokens == 0:
                return shape, texts, None
            self.metrics.prompt_tokens.labels(call.model).inc(shape.prompt_tokens)
            return shape, texts, worker.submit(requests)

    async def _prompts(self, worker: Worker, call: Call) -> list[list[int]]:
        """Return the ids of a call's prompts."""
        prompts = [await self._chat_ids(worker, call)] if call.chat else [self.ids(worker, one) for one in call.prompts]
        for ids in prompts:
            self._check_length(worker, ids, "messages" if call.chat else "prompt")
        return prompts

    def ids(self, worker: Worker, prompt: Prompt, name: str = "prompt") -> list[int]:
        """Return a prompt's ids.

        Raises:
            ApiError: The vocabulary lacks one of its symbols or ids.
        """
        if isinstance(prompt, str):
            try:
                return start_tokens(worker.tokenizer, prompt)
            except UserError as error:
                raise ApiError(f"{name}: {error}", name) from error
        size = int(worker.net.vocab_size)  # type: ignore[arg-type]
        if unknown := [i for i in prompt if not 0 <= i < size]:
            raise ApiError(f"{name} has the id {str(unknown[0])[:20]}: ids are at least 0 and below {size}", name)
        return prompt

    async def _chat_ids(self, worker: Worker, call: Call) -> list[int]:
        chat = worker.tokenizer.chat
        if not chat or "chat_template" not in chat:
            text = f"model {call.model!r} has no chat template: use /v1/completions"
            raise ApiError(text, "model", code="no_chat_template")
        try:
            ids = await prompt_of(self.templates, worker.tokenizer, chat, call.messages, goes_on=call.goes_on)
        except UserError as error:
            raise ApiError(f"messages: {error}", "messages") from error
        if not ids:
            raise ApiError("messages: the chat template makes an empty prompt of them", "messages")
        return ids

    def _check_length(self, worker: Worker, ids: list[int], name: str) -> None:
        longest = min(self.limits.max_prompt_tokens or worker.context or 1 << 16, worker.context or 1 << 16)
        if len(ids) > longest:
            text = f"{name}: it has {len(ids)} tokens, at most {longest} are taken: shorten it"
            raise ApiError(text, name, code="context_length_exceeded")

    async def _echo(self, worker: Worker, call: Call, number: int, ids: list[int]) -> tuple[str, list[Token]]:
        """Return what stands before the continuations: the prompt, with log-probabilities where they are wanted."""
        if not call.echo:
            return "", []
        prompt = call.prompts[number]
        text = prompt if isinstance(prompt, str) else worker.tokenizer.decode(ids)
        if call.logprobs is None or not text:
            return text, []
        tokens = [Token(ids[0], 1.0, {}, 0), *await worker.prompt_logprobs(ids, call.logprobs)]
        own = worker.tokenizer.encode(text).tolist() if isinstance(prompt, str) else ids
        tokens = tokens[len(ids) - len(own) :]  # without the token that every text begins with
        decoder, starts, length = worker.tokenizer.decoder(), list[int](), 0
        for token in tokens:
            starts.append(length)
            length += len(decoder.add(token.id))
        return text, [token._replace(start=start) for token, start in zip(tokens, starts, strict=True)]

    def _requests(self, worker: Worker, call: Call, prompts: list[list[int]]) -> list[Request]:
        """Return the engine's requests, best_of for each prompt.

        Raises:
            ApiError: logit_bias has an id that the network does not know.
        """
        size = int(worker.net.vocab_size)  # type: ignore[arg-type]
        if unknown := [i for i, _ in call.logit_bias if i >= size]:
            name = f"logit_bias.{unknown[0]}"
            raise ApiError(f"{name}: ids are below {size}", name)
        seed = int.from_bytes(os.urandom(7)) if call.seed is None else call.seed
        logprobs = 0 if call.logprobs is None and call.best_of > call.n else call.logprobs
        return [
            Request(
                prompt=ids, sampler=call.sampler, seed=(seed + i + 2**63) % 2**64 - 2**63,
                max_new_tokens=self._longest(worker, call, ids), stop=call.stop, logprobs=logprobs,
                logit_bias=call.logit_bias, presence_penalty=call.presence_penalty,
                frequency_penalty=call.frequency_penalty,
            )
            for ids in prompts
            for i in range(call.best_of)
        ]  # fmt: skip

    def _longest(self, worker: Worker, call: Call, ids: list[int]) -> int:
        """Return the longest continuation: a chat's is by default what the context leaves."""
        left = max(1, worker.context - len(ids)) if worker.context else self.limits.max_tokens
        return call.max_tokens or min(left, self.limits.max_tokens)

    def models(self) -> list[dict[str, Any]]:
        """Return the list of /v1/models."""
        return [self.model(name) for name in self.workers]

    def model(self, name: str) -> dict[str, Any]:
        """Return what is told of a model.

        Raises:
            ApiError: There is none of that name.
        """
        worker = self.worker(name)
        about = {"max_model_len": worker.context, "chat": bool(worker.tokenizer.chat)}
        return {"id": name, "object": "model", "created": worker.created, "owned_by": "lm", **about}
