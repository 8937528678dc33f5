"""Load and faults: limits, clients that go away or are slow, time-outs, and how the server ends."""

import json
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests

from tests.support.processes import start
from tests.support.served import served, written

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "logit_bias": {"256": -100}}
"""A request that takes seconds: beyond its context, the network reads all of it for each token."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    written(folder / "tiny.ckpt")
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    limits = ("--slots", 2, "--max_requests", 3, "--timeout", 20, "--body_timeout", 1, "--max_body_bytes", 5000)
    with served("--ckpt_path", "tiny.ckpt", *limits, "--cors_origin", "https://a.example", cwd=place) as found:
        yield found


@pytest.fixture
def url(server: tuple[str, Any]) -> str:
    return server[0]


def figures(url: str) -> dict[str, float]:
    lines = requests.get(f"{url}/metrics", timeout=20).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def until(condition: Any) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@contextmanager
def raw(url: str, data: bytes) -> Iterator[socket.socket]:
    """A connection on which something was sent."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(data)
        yield connection


def asked(body: Any, *headers: str) -> bytes:
    """Return a request as bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    if not any(line.startswith("content-length") for line in headers):
        lines.append(f"content-length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Return the status and the JSON of what comes on a connection that ends."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_full_queue_is_429_and_who_goes_away_makes_room(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
    streams: list[Any] = [client.completions.create(**LONG, stream=True) for _ in range(2)]  # type: ignore[call-overload]
    waiting = raw(url, asked(LONG))
    with waiting:
        until(lambda: figures(url)['lm_texts_waiting{model="tiny"}'] == 1)
        assert figures(url)['lm_cache_slots_used{model="tiny"}'] == 2
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(**{**LONG, "max_tokens": 1})  # type: ignore[call-overload]
        assert error.value.response.headers["retry-after"] == "1"
        assert error.value.type == "rate_limit_error" and error.value.code == "queue_full"
        for path, more in (("/tokenize", {}), ("/attention", {}), ("/v1/completions", {"echo": True, "max_tokens": 0})):
            asks = {"model": "tiny", "prompt": "a", **more}
            assert requests.post(url + path, json=asks, timeout=20).status_code == 429, path
        for stream in streams:
            next(iter(stream))
            stream.close()
    until(lambda: figures(url)['lm_cache_slots_used{model="tiny"}'] == 0)  # also that of the answer that is no stream
    assert figures(url)['lm_cancelled_total{model="tiny"}'] >= 3
    made = figures(url)['lm_generated_tokens_total{model="tiny"}']
    assert client.completions.create(**{**LONG, "max_tokens": 5}).usage.completion_tokens == 5  # type: ignore[call-overload]
    assert figures(url)['lm_generated_tokens_total{model="tiny"}'] == made + 5


def at_work(pid: int) -> bool:
    """Return whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_while_a_template_runs(place: Path) -> None:
    """Its request has a place, and it does not outlive the server by more than its second of processor time."""
    written(place / "slow.ckpt", chat="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    asks = {"model": "slow", "messages": [{"role": "user", "content": "a"}]}
    data = asked(asks, "connection: close").replace(b"/v1/", b"/v1/chat/", 1)
    text = {"model": "slow", "prompt": "a"}
    with served("--ckpt_path", "slow.ckpt", "--max_requests", 1, cwd=place) as (url, process):
        with raw(url, data) as first:
            until(lambda: requests.post(f"{url}/tokenize", json=text, timeout=20).status_code == 429)
            assert answer(first)[0] == 400
        until(lambda: requests.post(f"{url}/tokenize", json=text, timeout=20).status_code == 200)
        with raw(url, data):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            until(lambda: children.read_text().split())
            template = int(children.read_text().split()[0])
            process.kill()
        until(lambda: not at_work(template))


def test_a_slow_reader_does_not_hold_up_others(url: str) -> None:
    with raw(url, asked({**LONG, "max_tokens": 120, "stream": True, "logprobs": 5})):  # and reads nothing
        done = requests.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 100}, timeout=30)
        assert done.json()["usage"]["completion_tokens"] == 100
        until(lambda: figures(url)['lm_cache_slots_used{model="tiny"}'] == 0)


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (asked(b"{" + b" " * 6000), 413, "5000 bytes"),
        (asked(b'{"model"', "content-length: 100"), 408, "in time"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx: \x00\r\n\r\n", 400, "HTTP"),
        (b"nonsense\r\n\r\n", 400, "HTTP"),
        (asked(b"zz\r\n\r\n", "transfer-encoding: chunked"), 400, "HTTP"),
        (b"X" * 20_000 + b" / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 405, "XXXX"),
        (
            b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 40_000 + b"\r\nconnection: close\r\n\r\n",
            431,
            "headers",
        ),
        (b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404, "/nowhere"),
        (b"PUT /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 405, "PUT"),
        (b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n", 403, "Host"),
        (asked(b"{}", "connection: close").replace(b"/json", b"/xml"), 415, "application/json"),
        (asked(b'{"model":"\\ud800"}', "connection: close"), 400, "surrogate"),
        (asked(b"[" * 4000, "connection: close"), 400, "nested"),
        (asked(b'{"n": NaN}', "connection: close"), 400, "NaN"),
        (asked(b'{"n": 1, "n": 2}', "connection: close"), 400, "twice"),
        (asked(b'{"n": ' + b"9" * 4900 + b"}", "connection: close"), 400, "JSON"),
        (asked(b"\xff{}", "connection: close"), 400, "UTF-8"),
        (asked(b"[]", "connection: close"), 400, "an array"),
    ],
)
def test_errors_are_in_the_protocols_shape(url: str, data: bytes, status: int, said: str) -> None:
    with raw(url, data) as connection:
        code, body = answer(connection)
    assert code == status and set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"} and said in body["error"]["message"]
    assert len(body["error"]["message"]) < 1000
    assert requests.get(f"{url}/health", timeout=20).json() == {"status": "ok"}


def test_headers_that_do_not_arrive(url: str) -> None:
    with raw(url, b"POST /v1/comp") as connection:
        assert answer(connection)[0] == 408
    with raw(url, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:  # a second request, kept alive
        until(lambda: connection.recv(65536, socket.MSG_PEEK).endswith(b"}"))
        connection.recv(65536)
        connection.sendall(b"GET /health HT")
        assert answer(connection)[0] == 408
    with raw(url, asked(b"", "content-length: 9").replace(b"/v1/completions", b"/nowhere")) as connection:
        until(lambda: connection.recv(65536, socket.MSG_PEEK).endswith(b"}"))
        connection.sendall(b"{")  # of a body that nobody reads
        assert connection.recv(65536).startswith(b"HTTP/1.1 404") and connection.recv(65536) == b""


def test_too_many_connections(server: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = server
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (70, before[1]))  # leaves room for eight
    try:
        with ExitStack() as several:
            for _ in range(8):
                several.enter_context(raw(url, b""))
            with raw(url, b"") as one_more:
                assert answer(one_more)[0] == 503
            for _ in range(150):  # more than it may have files
                several.enter_context(raw(url, b""))
            time.sleep(1)
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
    assert requests.get(f"{url}/health", timeout=20).ok


def test_paths_that_are_not_there_leave_no_figures(url: str) -> None:
    for path in ("/v1/one", "/metrics/two", "/tokenize/three", "/v1/models/four"):
        requests.get(url + path, timeout=20)
    assert not [name for name in figures(url) if any(word in name for word in ("one", "two", "three", "four"))]


def test_only_a_named_origin_may_read_answers(url: str) -> None:
    for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
        asks = {"origin": origin, "access-control-request-method": "POST"}
        found = requests.options(f"{url}/v1/completions", headers=asks, timeout=20)
        assert (found.headers.get("access-control-allow-origin") == origin) is allowed
        assert allowed or found.json()["error"]["message"].startswith("Disallowed CORS origin")
        found = requests.get(f"{url}/v1/models", headers={"origin": origin}, timeout=20)
        assert ("access-control-allow-origin" in found.headers) is allowed


def test_headers(url: str) -> None:
    for path in ("/", "/health", "/nowhere"):
        headers = requests.get(url + path, timeout=20).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_who_takes_too_long(place: Path) -> None:
    with served("--ckpt_path", "tiny.ckpt", "--timeout", 0.5, cwd=place) as (url, _):
        found = requests.post(f"{url}/v1/completions", json=LONG, timeout=30)
        assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match=r"0\.5 seconds"):
            list(client.completions.create(**LONG, stream=True))  # type: ignore[call-overload]
        until(lambda: figures(url)['lm_cache_slots_used{model="tiny"}'] == 0)


@pytest.mark.parametrize(("grace", "finishes"), [(60, True), (0.5, False)])
def test_sigterm_lets_what_runs_finish(place: Path, grace: float, finishes: bool) -> None:
    with served("--ckpt_path", "tiny.ckpt", "--grace", grace, cwd=place) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream: Any = client.completions.create(  # type: ignore[call-overload]
            **{**LONG, "max_tokens": 300 if finishes else 4000}, stream=True
        )
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        if finishes:
            assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        else:
            with pytest.raises(openai.APIError, match="the server stops"):
                list(chunks)
        assert process.wait(60) == 143
        assert process.communicate()[1].splitlines() == ["stopped by SIGTERM"]


def test_two_stops_end_at_once(place: Path) -> None:
    with served("--ckpt_path", "tiny.ckpt", cwd=place) as (url, process):
        thread = threading.Thread(target=lambda: requests.post(f"{url}/v1/completions", json=LONG, timeout=60))
        thread.start()
        until(lambda: figures(url)['lm_cache_slots_used{model="tiny"}'] == 1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        thread.join()


def test_two_stops_end_who_does_not_send(place: Path) -> None:
    half = asked(LONG, "expect: 100-continue")[:-5]
    with served("--ckpt_path", "tiny.ckpt", cwd=place) as (url, process), raw(url, half) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100")  # it reads the body, which may take 30 seconds
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.wait(15) == 143


def test_keys(place: Path) -> None:
    (place / "keys").write_text("one\r\n# of the tests\r\nanother\r\n", encoding="utf-8-sig")
    with served("--ckpt_path", "tiny.ckpt", "--api_key_file", "keys", "--host", "0.0.0.0", cwd=place) as (url, _):
        for key in ("one", "another"):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            assert client.models.list().data
        for key in ("on", "one1", "", "ключ"):
            found = requests.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}".encode()}, timeout=20)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        for path in ("/metrics", "/tokenize", "/nowhere"):
            assert requests.get(url + path, timeout=20).status_code == 401
        assert requests.get(f"{url}/health", timeout=20).status_code == 200
        assert "<html" in requests.get(url, timeout=20).text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ckpt_path", "none.ckpt"), "none.ckpt"),
        (("--ckpt_path", "text.txt"), "text.txt"),
        (("--ckpt_path", "tiny.ckpt", "--host", "0.0.0.0"), "--host 0.0.0.0"),
        (("--ckpt_path", "tiny.ckpt", "--host", "no such host"), "no such host"),
        (("--ckpt_path", "tiny.ckpt", "tiny.ckpt"), "two checkpoints are called tiny"),
        (("--ckpt_path", "tiny.ckpt", "--api_key_file", "none"), "--api_key_file none"),
        (("--ckpt_path", "tiny.ckpt", "--cors_origin", "a.example"), "--cors_origin a.example"),
        (("--ckpt_path", "tiny.ckpt", "--port", 70000), "--port"),
        (("--ckpt_path", "long.ckpt", "--slots", 60000), "--slots 60000"),
        (("--ckpt_path", "tiny.ckpt", "--chat_template", "if.jinja"), "--chat_template if.jinja: line 2: "),
        ((), "ckpt_path"),
    ],
)
def test_a_start_that_fails_is_one_line(lm, workplace: Path, words: tuple[object, ...], said: str) -> None:
    Path("if.jinja").write_text("a\n{% if %}")
    written(Path("tiny.ckpt"))
    written(Path("long.ckpt"), block=1 << 20)
    code, out, err = lm("serve", *words, *(() if "--port" in words else ("--port", 0)))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert said in err


def test_a_port_in_use(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("serve", "--ckpt_path", "tiny.ckpt", "--port", port, cwd=place)
        assert process.communicate(timeout=60)[1].startswith(f"error: --port {port}: Address already in use")
