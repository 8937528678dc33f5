"""Requests that are malformed: each is refused in the protocol's shape, and the server answers afterwards."""

import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from lm.serving import openapi
from lm.serving.calls import Limits, parse
from lm.serving.errors import ApiError
from lm.serving.values import loads
from tests.support.served import served, written

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/tokenize": {"model": "tiny", "prompt": "ab"},
    "/attention": {"model": "tiny", "prompt": "ab"},
}
NAMES = (
    "model", "prompt", "messages", "n", "best_of", "echo", "stop", "seed", "logprobs", "top_logprobs", "logit_bias",
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "stream", "stream_options",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "layer", "head", "return_token_strs",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    -1, 10**30, 1e300, -0.5, 2.5, "", "\0", "☃" * 3000, "a" * 3000, [], {}, [[]], [{}], [None], {"a": {}}, [1, "a"],
    "true", False, [[1], [2, "b"]], [-1], [10**12], {"-1": 1}, {"1": "a"}, {"1": 1e9}, {"role": "a"}, [{"role": "x"}],
)  # fmt: skip


def drawn(draw: random.Random) -> tuple[str, bytes]:
    """Return a path and a body that no server may take: values of wrong types and sizes, or broken bytes."""
    path = draw.choice(list(GOOD))
    body = json.dumps(GOOD[path] | {draw.choice(NAMES): draw.choice(ODD) for _ in range(draw.randint(1, 3))}).encode()
    kind = draw.randrange(6)
    if kind == 0:
        at = draw.randrange(len(body))
        body = body[:at]
    elif kind == 1:
        at = draw.randrange(len(body))
        body = body[:at] + bytes([draw.randrange(256)]) * draw.randint(1, 3) + body[at + 1 :]
    elif kind == 2:
        body = draw.choice(
            [b"", b"null", b"[" * 3000, b'{"a":' * 2000, b"\xef\xbb\xbf{}", body.decode().encode("utf-16")]
        )
    elif kind == 3:
        body = body[:-1] + b', "model": "other"}'
    return path, body


def raw(draw: random.Random, path: str, body: bytes) -> bytes:
    """Return a request whose headers, or whose end, are wrong."""
    length = draw.choice([str(len(body)), "-1", "x", "99999999999999999999", str(len(body) + 9)])
    lines = [
        f"{draw.choice(['POST', 'GET', 'post', 'X' * 50])} {draw.choice([path, '*', '/../' + path, path + '%00'])} "
        f"HTTP/{draw.choice(['1.1', '1.0', '9.9', 'x'])}",
        "host: localhost",
        draw.choice(["content-type: application/json", "content-type: text/plain", "content-type:", "no header"]),
        f"content-length: {length}",
        draw.choice(["x: y", "transfer-encoding: chunked", "content-length: 3", "expect: 100-continue", "x: \x01"]),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body[: draw.choice([0, 3, len(body)])]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp("served")
    written(folder / "tiny.ckpt")
    with served("--ckpt_path", "tiny.ckpt", "--body_timeout", 0.5, cwd=folder) as found:
        yield found


def check(status: int, body: Any, case: Any) -> None:
    assert status == 200 or 400 <= status < 500, case
    if status != 200:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, case
        assert isinstance(body["error"]["message"], str) and len(body["error"]["message"]) < 1000, case


def read(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except TimeoutError:
        pass
    return data


@pytest.mark.slow
def test_five_hundred_malformed_requests(server: tuple[str, Any]) -> None:
    url, process = server
    draw, session, statuses = random.Random(7), requests.Session(), []
    for _ in range(400):
        path, body = drawn(draw)
        found = session.post(url + path, data=body, headers={"content-type": "application/json"}, timeout=60)
        stream = found.headers["content-type"].startswith("text/event-stream")
        check(found.status_code, None if stream else found.json(), (path, body[:200]))
        statuses.append(found.status_code)
    assert statuses.count(400) > 300
    parts = urlsplit(url)
    for _ in range(100):
        case = raw(draw, *drawn(draw))
        with socket.create_connection((parts.hostname, parts.port), timeout=1.5) as connection:
            connection.sendall(case)
            if draw.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)
            said = re.sub(rb"^HTTP/1.1 100 .*\r\n\r\n", b"", read(connection))
            head, _, body = said.partition(b"\r\n\r\n")
        if head:  # nobody is told who has gone before the end
            check(int(head.split()[1]), json.loads(body) if b"chunked" not in head and body else {}, case)
    for path, good in GOOD.items():
        assert session.post(url + path, json=good, timeout=60).status_code == 200
    process.terminate()
    assert process.wait(60) == 143
    assert process.communicate()[1].splitlines() == ["stopped by SIGTERM"]


@pytest.mark.slow
def test_what_the_openapi_document_allows(tmp_path: Path) -> None:
    """schemathesis draws requests by the document, and holds the answers against it."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    written(tmp_path / "tiny.ckpt")
    with served("--ckpt_path", "tiny.ckpt", "--max_tokens", 8, cwd=tmp_path) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == 8
        for operation in operations:

            @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def try_one(case: Any) -> None:
                if isinstance(case.body, dict) and case.body.get("model"):
                    case.body["model"] = "tiny"
                # limits depend on each other, and on the network
                case.call_and_validate(base_url=url, timeout=60, excluded_checks=[positive_data_acceptance])

            try_one()


def test_the_document_has_every_parameter_that_is_taken() -> None:
    limits = Limits()
    paths = openapi.document(limits)["paths"]
    for path, chat in (("/v1/completions", False), ("/v1/chat/completions", True)):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False
        for name in schema["properties"]:
            with pytest.raises(ApiError) as error:
                parse(GOOD[path] | {name: {"odd": object}}, chat, limits)
            assert error.value.code != "unknown_parameter" or error.value.param != name, name


def test_json_is_read_strictly() -> None:
    assert loads(b'{"a": 2.0}') == {"a": 2} and isinstance(loads(b'{"a": 2.0}')["a"], int)
    assert loads(b'{"a": 1e999, "b": "\\ud83d\\ude00"}')["b"] == "😀"
    for body in (
        b'{"a": Infinity}',
        b'{"a": 1, "a": 1}',
        b'"\\udc00"',
        b"{} {}",
        b"",
        b'{"a": "\\ud83d"}',
        b"\xff\xfe{",
    ):
        with pytest.raises(ApiError):
            loads(body)
