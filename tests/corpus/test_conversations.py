import json
from pathlib import Path

import pytest

from lm.corpus import conversations, generated
from lm.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def written(*rows: object) -> str:
    Path("chats.jsonl").write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows))
    return "chats.jsonl"


def test_both_forms_and_empty_lines(workplace: Path) -> None:
    found = conversations.read(written({"prompt": "a", "completion": "b"}, "", {"messages": [USER, ASSISTANT]}))
    assert found == [[USER, ASSISTANT]] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: it is no JSON: expected an object"),
        ([], "line 2: it is a list: expected an object"),
        ("null", "line 2: it is null: expected an object"),
        ({"text": "a"}, "line 2: it has 'text': expected messages, or prompt and completion"),
        ({"prompt": "a"}, "line 2: it has no completion: expected a text"),
        ({"prompt": "a", "completion": ""}, "line 2: its completion is empty: expected a text"),
        ({"prompt": 3, "completion": "b"}, "line 2: its prompt is a number: expected a text"),
        ({"prompt": "\ud800", "completion": "b"}, "line 2: its prompt has half of a surrogate pair"),
        ({"messages": "a"}, "line 2: its messages are a text: expected a list"),
        ({"messages": []}, "line 2: it has no messages: expected the assistant's answer at the end"),
        ({"messages": [USER]}, "line 2: its last role is user: expected the assistant's answer"),
        ({"messages": ["a"]}, "line 2, message 1: it is a text: expected an object"),
        ({"messages": [ASSISTANT]}, "line 2, message 1: its role is assistant: expected system or user"),
        ({"messages": [USER, USER]}, "line 2, message 2: its role is user: expected assistant"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "line 2, message 3: its role is assistant: expected user"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: its role is 'bot': expected system or user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "its role is ['user']: expected system or user"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of the assistant: it has no content: expected"),
        ({"messages": [USER, ASSISTANT | {"content": ""}]}, "message 2 of the assistant: its content is empty"),
    ],
)
def test_a_line_that_is_no_conversation(workplace: Path, row: object, message: str) -> None:
    with pytest.raises(UserError) as found:
        conversations.read(written({"prompt": "a", "completion": "b"}, row))
    assert f"corpus chats.jsonl, {message}" in str(found.value) or message in str(found.value)
    assert "line 2" in str(found.value) and "\n" not in str(found.value)


def test_files_that_are_none(workplace: Path) -> None:
    for corpus, message in (
        (written(), "it has no lines"),
        (".", "it is a folder"),
        ("none.jsonl", "no such file"),
        ("python-docs", "line 1: it is no JSON"),
    ):
        with pytest.raises(UserError, match=message):
            conversations.read(corpus)


def test_generated_ones_differ_and_are_right(workplace: Path) -> None:
    found = [json.loads(line)["messages"] for line in generated.conversations(500).splitlines()]
    assert len({json.dumps(one) for one in found}) == 500 and {len(one) for one in found} == {2, 4}
    for question, answer in (
        (one[i]["content"], one[i + 1]["content"]) for one in found for i in range(0, len(one), 2)
    ):
        words = question.strip("?.").split()
        expected = {
            "Add": lambda w: str(int(w[1]) + int(w[3].strip(",")))[::-1],
            "Reverse": lambda w: w[1][::-1],
            "Write": lambda w: w[1].upper(),
            "How": lambda w: str(w[4].count(w[2])),
        }[words[0]](words)
        assert answer == expected
