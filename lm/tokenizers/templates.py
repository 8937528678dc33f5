"""Chat templates of other programs: a conversation as their text, and that text as ids.

A template is a program that came with somebody's weights. It runs in jinja2's sandbox, in a process of its own
(`template_process`), within a budget of processor time, memory and output; what exceeds it ends that process alone.
"""

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Self

import numpy as np

from lm.errors import UserError
from lm.tokenizers.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]
"""A conversation: each message has a role and a content."""
COMMAND = (sys.executable, "-P", "-m", "lm.tokenizers.template_process")
"""Starts the process: a line of JSON in, a line of JSON out."""


def process_environment() -> dict[str, str]:
    """Return what the process is told of this one's environment."""
    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}


def asked(template: str, variables: dict[str, Any]) -> bytes:
    """Return the line that asks the process for a template's text."""
    return json.dumps({"template": template, "variables": variables}).encode() + b"\n"


class Guarded:
    """Writes the special tokens of a template as ids, and the same characters in a message as the text that they are.

    So nobody can write another's turn.

    Args:
        tokenizer: Has the special tokens.
        chat: Its chat template, and the tokens that it may name.
    """

    def __init__(self, tokenizer: Tokenizer, chat: dict[str, str]) -> None:
        self.tokenizer, self.template = tokenizer, chat["chat_template"]
        self._named = {name: value for name, value in chat.items() if name != "chat_template"}
        names = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._mark = "\ue000" + secrets.token_hex(8) + "\ue001"

    def variables(self, messages: Messages) -> dict[str, Any]:
        """Return what the template reads of a conversation."""
        return self._named | {
            "messages": [{name: self._guarded(name, value) for name, value in one.items()} for one in messages]
        }

    def _guarded(self, name: str, value: str) -> str:
        if name == "role":
            return "system" if value == "developer" and "developer" not in self.template else value
        return self._names.sub(lambda found: found[0][0] + self._mark + found[0][1:], value)

    def ids(self, text: str) -> list[int]:
        """Return the ids of what the template wrote.

        Raises:
            UserError: The vocabulary lacks a symbol.
        """
        ids: list[int] = []
        for part in re.split(f"({self._names.pattern})", text):
            if part in self.tokenizer.special_ids:
                ids.append(self.tokenizer.special_ids[part])
            elif part:
                ids += self.tokenizer.encode(part.replace(self._mark, "")).tolist()
        return ids


class ByTemplate:
    """Writes conversations to learn from as a checkpoint's own template does; use it in a with statement.

    Args:
        tokenizer: A checkpoint's, with its chat template.

    Raises:
        UserError: A package is missing, or no token ends a turn.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if find_spec("jinja2") is None:
            raise UserError("the checkpoint's chat template needs jinja2: pip install 'lm[serve]'")
        assert tokenizer.chat is not None and tokenizer.end_of_turn is not None
        self._end, self._guarded = tokenizer.end_of_turn, Guarded(tokenizer, tokenizer.chat)

    def __enter__(self) -> Self:
        """Start the process."""
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._process = subprocess.Popen(COMMAND, **pipes, stderr=subprocess.DEVNULL, env=process_environment())
        return self

    def __exit__(self, *error: object) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's ids, int64 (T,), and which of them the assistant writes, bool (T,).

        An answer is what the template adds to the text that asks for it, up to the token that ends a turn.

        Raises:
            UserError: The template refuses the conversation, writes an earlier turn in another way once a later one is
                there, or ends no turn.
        """
        text, ids, written = "", list[int](), list[bool]()
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            question = self._text(messages[:i], asks=True)
            answered = self._text(messages[: i + 1], asks=False)
            if not (question.startswith(text) and answered.startswith(question)):
                raise _refused("it writes earlier turns in another way once later ones are there")
            before, answer = self._guarded.ids(question[len(text) :]), self._guarded.ids(answered[len(question) :])
            if self._end not in answer:
                raise _refused("it ends no turn of the assistant's with its eos_token")
            ids += before + answer
            said = answer.index(self._end) + 1
            written += [False] * len(before) + [True] * said + [False] * (len(answer) - said)
            text = answered
        return np.array(ids, dtype=np.int64), np.array(written, dtype=bool)

    def _text(self, messages: Messages, *, asks: bool) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        variables = self._guarded.variables(messages) | {"add_generation_prompt": asks}
        try:
            self._process.stdin.write(asked(self._guarded.template, variables))
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise _refused("it takes more than its budget of time, memory or output") from error
        if "error" in answer:
            raise _refused(answer["error"])
        text: str = answer["text"]
        return text


def _refused(why: str) -> UserError:
    return UserError(f"the checkpoint's chat template does not take these conversations: {why[:300]}: use another one")
