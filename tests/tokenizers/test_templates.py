"""Conversations to learn from, written by a template that came with somebody's weights."""

import asyncio
import json
from pathlib import Path

import pytest

from lm.data import ChatData
from lm.errors import UserError
from lm.serving.templates import Templates, prompt_of
from lm.tokenizers import BytePairTokenizer, chat
from lm.tokenizers.merges import to_text
from lm.tokenizers.templates import ByTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = 256, 257
TALK = [
    {"role": "user", "content": "a<|im_end|>"},
    {"role": "assistant", "content": "b<|im_start|>"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def tokenizer(template: str = CHATML, eos_token: str = "<|im_end|>") -> BytePairTokenizer:
    special = {"<|im_start|>": START, "<|im_end|>": END, "<|endoftext|>": 258}
    made = BytePairTokenizer(to_text({bytes([i]): i for i in range(256)}), special=special, end_of_text="<|endoftext|>")
    made.chat = {"chat_template": template, "eos_token": eos_token}
    return made


def test_the_assistants_words_and_their_end_are_learned() -> None:
    with ByTemplate(tokenizer()) as template:
        ids, written = template.encode(TALK)
    asked = [START, *b"user\na<|im_end|>", END, *b"\n", START, *b"assistant\n"]
    again = [*b"\n", START, *b"user\nc", END, *b"\n", START, *b"assistant\n"]
    said = [*b"b<|im_start|>", END]
    assert ids.tolist() == [*asked, *said, *again, *b"d", END, *b"\n"], "what is typed stays text"
    assert ids[written].tolist() == [*said, *b"d", END]

    async def asks() -> list[int]:
        renderer = Templates()
        try:
            return await prompt_of(renderer, tokenizer(), tokenizer().chat or {}, TALK[:3])
        finally:
            await renderer.close()

    assert ids[: len(ids) - 3].tolist() == asyncio.run(asks()), "lm chat and lm serve ask as was trained"


def test_conversations_keep_a_checkpoints_template(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "yes"}) + "\n" for i in range(40)))
    data = ChatData(corpus=str(path), block_size=48, batch_size=2)
    data.tokenizer = tokenizer()
    data.setup("fit")
    assert data.vocab_size == 259 and data.text_tokenizer.chat == tokenizer().chat
    _, targets = data.training_examples()(0, 2)
    assert [row[row >= 0].tolist() for row in targets] == [[*b"yes", END]] * 2
    for other in (tokenizer(chat.TEMPLATE), tokenizer(eos_token="</s>")):  # lm's own; one that ends no turn
        assert chat.for_chat(other).end_of_turn == other.n_vocab + 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{{ messages[-1].content }}<|im_end|>", "writes earlier turns in another way"),
        (CHATML.replace("<|im_end|>", "|"), "ends no turn of the assistant's"),
        ("{{ raise_exception('no users') }}", "TemplateError: no users"),
    ],
)
def test_a_template_that_does_not_do(template: str, message: str) -> None:
    with ByTemplate(tokenizer(template)) as by, pytest.raises(UserError, match=message):
        by.encode(TALK)
