"""Conversations as tokens: a special token for whose turn it is, one that ends a turn, and text between them.

The template and `encode` write the same; so what a network was trained on is what `lm chat` and the server ask it. Text
never becomes a special token: `<|user|>` that somebody types is eight characters.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from lm.tokenizers.templates import ByTemplate, Messages
from lm.tokenizers.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
END = "<|end|>"
MARKS = {role: f"<|{role}|>" for role in ROLES}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('the role is ' + message['role'] + ': expected system, user or assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def for_chat(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer of the same text with the special tokens of conversations, and with their template.

    One that has another template, and the token by which that ends a turn, stays as it is.

    Raises:
        UserError: It takes no special tokens.
    """
    if has_another_template(tokenizer):
        return tokenizer
    missing = [name for name in (*MARKS.values(), END) if name not in tokenizer.special_ids]
    made = tokenizer.with_special(missing) if missing else tokenizer
    made.chat = {"chat_template": TEMPLATE, "eos_token": END}
    return made


def has_another_template(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer came with a template other than lm's, by which conversations can be learned."""
    found = tokenizer.chat or {}
    ends = tokenizer.eot is not None and found.get("eos_token") in tokenizer.special_ids
    return ends and found.get("chat_template", TEMPLATE) != TEMPLATE


def encode_all(tokenizer: Tokenizer, conversations: Iterable[Messages]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what `encode` returns of each conversation, written by the tokenizer's own template.

    Raises:
        UserError: The vocabulary lacks a symbol, or the template does not suit a conversation.
    """
    if not has_another_template(tokenizer):
        yield from (encode(tokenizer, one) for one in conversations)
        return
    with ByTemplate(tokenizer) as template:
        yield from map(template.encode, conversations)


def encode(tokenizer: Tokenizer, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """Return a conversation's ids by lm's template, int64 (T,), and which of them the assistant writes, bool (T,).

    That is its words and the end of its turn, which it must learn to write as much as the words. The token that opens
    its turn is given to it.

    Args:
        tokenizer: What `for_chat` returned.
        messages: The conversation.

    Raises:
        UserError: The vocabulary lacks a symbol.
    """
    ids, written = list[int](), list[bool]()
    for message in messages:
        words = [*tokenizer.encode(message["content"]).tolist(), tokenizer.special_ids[END]]
        ids += [tokenizer.special_ids[MARKS[message["role"]]], *words]
        written += [False] + [message["role"] == "assistant"] * len(words)
    return np.array(ids, dtype=np.int64), np.array(written, dtype=bool)
