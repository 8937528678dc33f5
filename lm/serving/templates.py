"""Chat templates: from a conversation to the ids of a prompt. `lm.tokenizers.templates` says how they are run."""

import asyncio
import contextlib
import json
import secrets
from typing import Any

from lm.serving.errors import ApiError
from lm.tokenizers import Tokenizer, templates
from lm.tokenizers.templates import Guarded

WAIT = 30.0
"""Seconds of the clock for what may take a second of processor time."""


class Templates:
    """Runs templates, one at a time."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def render(self, template: str, variables: dict[str, Any]) -> str:
        """Return a template's text.

        Raises:
            ApiError: It refuses the conversation, is no template, or exceeds its budget.
        """
        asked = templates.asked(template, variables)
        async with self._lock:
            try:
                answer = await asyncio.wait_for(self._ask(asked), WAIT)
            except (OSError, ValueError, TimeoutError) as error:  # the process has ended, or does not answer
                await self.close()
                raise _refused("it takes more than its budget of time, memory or output") from error
            except asyncio.CancelledError:  # what it answers now is nobody's
                self._drop()
                raise
        if "error" in answer:
            raise _refused(answer["error"])
        text: str = answer["text"]
        return text

    async def _ask(self, line: bytes) -> Any:
        if self._process is None or self._process.returncode is not None:
            self._process = await _started()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line)
        await self._process.stdin.drain()
        return json.loads(await self._process.stdout.readline())

    async def close(self) -> None:
        """End the process."""
        if (process := self._drop()) is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 2)

    def _drop(self) -> asyncio.subprocess.Process | None:
        """Kill the process; the next template gets a new one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return process


async def _started() -> asyncio.subprocess.Process:
    """Return a new process that runs templates."""
    try:
        return await asyncio.create_subprocess_exec(
            *templates.COMMAND,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=templates.process_environment(), limit=1 << 24, start_new_session=True,
        )  # fmt: skip
    except OSError as error:  # it is not the template's fault
        raise ApiError(f"the process for chat templates does not start: {error.strerror}", status=500) from error


def _refused(why: str) -> ApiError:
    return ApiError(f"the chat template does not take these messages: {why[:300]}", "messages", code="chat_template")


async def prompt_of(
    renderer: Templates,
    tokenizer: Tokenizer,
    chat: dict[str, str],
    messages: list[dict[str, str]],
    *,
    goes_on: bool = False,
) -> list[int]:
    """Return the ids of a conversation, up to where the assistant answers, or goes on with the last message.

    The template's own special tokens become ids; the same characters in a message stay text, so that nobody can write
    another's turn.

    Raises:
        ApiError: The template does not take the messages.
        UserError: The vocabulary lacks a symbol.
    """
    guarded, end = Guarded(tokenizer, chat), "\ue000" + secrets.token_hex(8) + "\ue001"
    variables = guarded.variables(messages)
    if goes_on:
        variables["messages"][-1]["content"] += end
    text = await renderer.render(guarded.template, variables | {"add_generation_prompt": not goes_on})
    if goes_on:
        text, found, _ = text.rpartition(end)
        if not found:
            raise _refused("it leaves the last message out, so nothing can go on from it")
    return guarded.ids(text)
