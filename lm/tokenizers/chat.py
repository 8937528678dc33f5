"""Conversations as tokens: a special token for whose turn it is, one that ends a turn, and text between them.

The template and `encode` write the same; so what a network was trained on is what `lm chat` and the server ask it. Text
never becomes a special token: `<|user|>` that somebody types is eight characters.
"""

from collections.abc import Sequence

import numpy as np

from lm.tokenizers.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]
"""A conversation: each message has a role and a content."""
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

    Raises:
        UserError: It takes no special tokens.
    """
    missing = [name for name in (*MARKS.values(), END) if name not in tokenizer.special_ids]
    made = tokenizer.with_special(missing) if missing else tokenizer
    made.chat = {"chat_template": TEMPLATE, "eos_token": END}
    return made


def encode(tokenizer: Tokenizer, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """Return a conversation's ids, int64 (T,), and which of them the assistant writes, bool (T,).

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
