"""The whole server, in a process of its own, by the client that people use: the openai package."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lm.checkpoints.restore import load_network
from lm.generation import Sampler
from lm.generation.engine import Engine, Request
from lm.tokenizers import ByteTokenizer
from tests.conftest import ROOT
from tests.support.served import served, windowed, written

Client = openai.OpenAI
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    written(folder / "checkpoints/tiny/best.ckpt")
    written(folder / "checkpoints/plain/last.ckpt", chat=None)
    windowed(folder / "short.ckpt")
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    paths = ("checkpoints/tiny/best.ckpt", "checkpoints/plain/last.ckpt", "named=short.ckpt")
    with served("--ckpt_path", *paths, "--max_tokens", 300, "--max_prompt_tokens", 100, cwd=place) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def completed(client: Client, **more: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": "To be", "max_tokens": 12, "seed": 5, **more})


def chatted(client: Client, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HI, "max_tokens": 12, "seed": 5, **more}
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bash", "python"])
def test_the_documents_examples(place: Path, tmp_path: Path, kind: str) -> None:
    """The blocks of docs/serving.md that are for a server which runs; its port is another one here."""
    text = (ROOT / "docs/serving.md").read_text()
    blocks = re.findall(rf'^```{kind} title="(curl|the openai package)"\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    folder = place / "checkpoints/quickstart"
    with served("--ckpt_path", written(folder / "best.ckpt"), cwd=tmp_path) as (url, _):
        code = blocks[0][1].replace("http://127.0.0.1:8000", url)
        if kind == "python":
            exec(compile(code, "docs/serving.md", "exec"), {})
        else:
            code = code.replace("curl -s", "curl --fail-with-body -s")
            done = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout
            assert done.stdout.rstrip().endswith("}") and "data: [DONE]" in done.stdout


def test_models(client: Client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "plain", "named"]
    assert client.models.retrieve("named").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_its_tokens_are_the_engines(client: Client, place: Path) -> None:
    fitted = load_network(place / "checkpoints/tiny/best.ckpt")
    prompt = ByteTokenizer().encode("To be").tolist()
    all_of_it = {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.3}
    penalties: Any = {"presence_penalty": 1.5, "frequency_penalty": -0.5}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"sampler": Sampler(temperature=0)}, {"temperature": 0}),
        ({}, {}),
        (
            {"sampler": Sampler(temperature=0.7, top_p=0.9, **all_of_it)},
            {"temperature": 0.7, "top_p": 0.9, "extra_body": all_of_it},
        ),
        ({"logit_bias": ((65, 3.0),), **penalties}, {"logit_bias": {"65": 3}, **penalties}),
    ]
    for settings, options in cases:
        engine = Engine(fitted.net, fitted.tokenizer)
        requests = [Request(prompt=prompt, seed=5 + i, max_new_tokens=20, **settings) for i in range(2)]
        expected = [text.text for text in engine.run(requests)]
        found = completed(client, n=2, max_tokens=20, **options)
        assert [choice.text for choice in found.choices] == expected
        assert completed(client, max_tokens=20, prompt=prompt, **options).choices[0].text == expected[0]


def joined(stream: Any) -> tuple[dict[int, str], dict[int, list[Any]], dict[int, list[str]], list[Any]]:
    """Return a stream's texts, log-probabilities and reasons by index, and its usages."""
    texts: dict[int, str] = {}
    logprobs: dict[int, list[Any]] = {}
    reasons: dict[int, list[str]] = {}
    usages = []
    for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            delta = getattr(choice, "delta", None)
            texts[choice.index] = texts.get(choice.index, "") + ((delta.content or "") if delta else choice.text)
            if choice.logprobs is not None:
                told = getattr(choice.logprobs, "content", None)
                kept = told or list(
                    zip(choice.logprobs.tokens or [], choice.logprobs.token_logprobs or [],
                        choice.logprobs.top_logprobs or [], choice.logprobs.text_offset or [], strict=True)
                )  # fmt: skip
                logprobs.setdefault(choice.index, []).extend(kept)
            if choice.finish_reason:
                reasons.setdefault(choice.index, []).append(choice.finish_reason)
    return texts, logprobs, reasons, usages


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3, "n": 3},
        {"echo": True, "logprobs": 0, "temperature": 0},
        {"prompt": ["a", "bc"], "n": 2, "max_tokens": 40, "stop": ["e", "t"]},
        {"logit_bias": {"256": 5}, "max_tokens": 60},  # the end of the text
        {"echo": True, "max_tokens": 0, "logprobs": 2},
    ],
)
def test_streamed_is_as_whole(client: Client, options: dict[str, Any]) -> None:
    whole = completed(client, **options)
    texts, logprobs, reasons, usages = joined(
        completed(client, stream=True, stream_options={"include_usage": True}, **options)
    )
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == [choice.finish_reason]
        told = choice.logprobs
        if told is not None:
            rows = zip(told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True)
            assert logprobs[choice.index] == list(rows)
    assert len(texts) == len(whole.choices)
    assert usages[-1] == whole.usage and usages[:-1] == [None] * (len(usages) - 1)
    if "stop" in options:
        assert not any(stop in text for text in texts.values() for stop in options["stop"])


def test_chats_streamed_are_as_whole(client: Client) -> None:
    options: dict[str, Any] = {"n": 2, "logprobs": True, "top_logprobs": 4}
    whole = chatted(client, **options)
    texts, logprobs, reasons, usages = joined(chatted(client, stream=True, **options))
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert logprobs[choice.index] == choice.logprobs.content
        assert all(len(one.top_logprobs) == 4 for one in choice.logprobs.content)
        assert reasons[choice.index] == ["length"]
    assert not any(usages)
    written_out = "<|endoftext|>user: hi\nassistant: "
    ids = [256, *written_out.removeprefix("<|endoftext|>").encode()]
    assert whole.usage.prompt_tokens == len(ids)
    assert completed(client, prompt=ids).choices[0].text == whole.choices[0].message.content


def test_a_chats_answer_goes_on(client: Client) -> None:
    begun = [*HI, {"role": "assistant", "content": "To be"}]
    found = chatted(client, messages=begun, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    written_out = b"user: hi\n\0assistant: To be"
    ids = [256, *(256 if byte == 0 else byte for byte in written_out)]
    assert found.choices[0].message.content == completed(client, prompt=ids).choices[0].text
    assert found.usage.prompt_tokens == len(ids)


def test_what_is_counted(client: Client) -> None:
    found = completed(client, prompt=["abc", "de"], n=2, max_tokens=7)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 28, 33)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len(completed(client, max_tokens=None).choices[0].logprobs or []) == 0
    assert completed(client, max_tokens=None).usage.completion_tokens == 16  # OpenAI's default


def test_logprobs(client: Client) -> None:
    none, some = completed(client, logprobs=0), completed(client, logprobs=5)
    assert completed(client).choices[0].logprobs is None
    for number, found in ((0, none), (5, some)):
        told = found.choices[0].logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 12
        assert all(number <= len(likeliest) <= number + 1 for likeliest in told.top_logprobs)
        rows = zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True)
        assert all(likeliest[own] == x for own, x, likeliest in rows)
    greedy = completed(client, logprobs=1, temperature=0).choices[0].logprobs
    assert all(len(one) == 1 for one in greedy.top_logprobs)
    scored = completed(client, prompt="abcd", echo=True, max_tokens=0, logprobs=1)
    assert scored.choices[0].text == "abcd" and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert all(x < 0 for x in scored.choices[0].logprobs.token_logprobs[1:])


def test_options_that_change_logits(client: Client) -> None:
    first = completed(client, temperature=0).choices[0].text.encode()[0]
    assert first != completed(client, temperature=0, logit_bias={str(first): -100}).choices[0].text.encode()[0]
    forced = completed(client, temperature=0, logit_bias={"65": 100}).choices[0].text
    assert forced == "A" * 12


def test_the_best_of_several(client: Client) -> None:
    every = completed(client, n=6, logprobs=0)
    means = [sum(choice.logprobs.token_logprobs) / 12 for choice in every.choices]
    best = completed(client, n=2, best_of=6)
    ranked = sorted(range(6), key=lambda i: -means[i])[:2]
    assert [choice.text for choice in best.choices] == [every.choices[i].text for i in ranked]
    assert best.usage.completion_tokens == 72 and best.choices[0].logprobs is None


def test_a_network_that_reads_windows(client: Client) -> None:
    found = completed(client, model="named", prompt="abc " * 10, max_tokens=9, logprobs=1, echo=True)
    told = found.choices[0].logprobs
    assert len(found.choices[0].text) == 49 and told.text_offset == list(range(49))
    assert "".join(told.tokens) == found.choices[0].text


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x" * 101}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [[1], ["a"]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 301}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"n": 9, "prompt": ["a", "b"]}, "n"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
    ({"logprobs": 6}, "logprobs"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"logit_bias": {"257": 1}}, "logit_bias.257"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"suffix": "x"}, "suffix"),
    ({"extra_body": {"top_k": -2}}, "top_k"),
    ({"extra_body": {"min_p": 2}}, "min_p"),
    ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
    ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
]


@pytest.mark.parametrize(("options", "param"), WRONG)
def test_what_is_not_served_is_refused_by_name(client: Client, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        completed(client, **options)
    assert error.value.param == param and error.value.type == "invalid_request_error"
    assert param.partition(".")[0] in error.value.message
    assert completed(client, max_tokens=1).choices


CHAT_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "plain"}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0] of type image_url",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"extra_body": {"continue_final_message": True}}, "continue_final_message"),
    ({"extra_body": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ({"messages": [{"role": "user", "content": "x" * 120}]}, "messages"),
]


@pytest.mark.parametrize(("options", "param"), CHAT_WRONG)
def test_what_is_not_served_of_chats(client: Client, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chatted(client, **options)
    assert error.value.param == param


def test_values_that_ask_for_nothing_are_taken(client: Client) -> None:
    off: dict[str, Any] = {"tools": [], "response_format": {"type": "text"}, "store": False, "user": "me"}
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    plain = chatted(client)
    assert chatted(client, messages=parts, stop=None, logit_bias={}, **off).choices == plain.choices
    assert chatted(client, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 128 - 21
