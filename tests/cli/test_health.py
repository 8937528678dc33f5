"""`lm health` asks a server; what serves nothing is as healthy as its process."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lm.cli.health import served_by


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    one = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def test_a_server_is_healthy_where_it_answers_and_well(lm, server: HTTPServer) -> None:
    address = f"http://127.0.0.1:{server.server_port}"
    assert lm("health", "--url", f"{address}/health") == (0, f"{address}/health: 200\n", "")
    code, _, err = lm("health", "--url", f"{address}/other")
    assert code == 1 and err.startswith(f"error: {address}/other: ") and len(err.splitlines()) == 1
    server.shutdown()
    server.server_close()
    code, _, err = lm("health", "--url", f"{address}/health")
    assert code == 1 and "Connection refused" in err


@pytest.mark.parametrize(
    ("words", "url"),
    [
        (["python", "lm", "serve", "--ckpt_path", "a.ckpt"], "http://127.0.0.1:8000/health"),
        (["python", "lm", "serve", "--port", "9000", "--ckpt_path", "a.ckpt"], "http://127.0.0.1:9000/health"),
        (["python", "lm", "serve", "--port=9001"], "http://127.0.0.1:9001/health"),
        (["python", "lm", "fit", "--config", "serve.yaml"], None),
    ],
)
def test_process_1_says_what_is_served(tmp_path: Path, words: list[str], url: str | None) -> None:
    (tmp_path / "cmdline").write_bytes("".join(f"{word}\0" for word in words).encode())
    assert served_by(tmp_path / "cmdline") == url
