"""What every request passes: headers that browsers heed, keys, hosts, and errors in the protocol's shape."""

import hmac
import ipaddress
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm import log, storage
from lm.errors import UserError, described, setting
from lm.serving.errors import ApiError
from lm.serving.metrics import Metrics

KEY = "LM_API_KEY"
OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key: the page asks for one, and load balancers have none."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LONGEST_HEADERS = 32 << 10
CLOSED = "default-src 'none'; frame-ancestors 'none'"
"""The Content-Security-Policy of all that is no page."""


def read_keys(file: Path | None) -> list[bytes]:
    """Return the keys that clients may show: the lines of a file, or the environment's LM_API_KEY.

    Raises:
        UserError: The file cannot be read, or there is no key in it that a header can hold.
    """
    if file is None:
        lines, source = [os.environ.get(KEY, "")], f"{KEY} in the environment"
        if KEY not in os.environ:
            return []
    else:
        source = f"{setting('api_key_file')} {file}"
        try:
            lines = storage.plain(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UserError(f"{source} has no key: write one a line")
    if any(not (key.isascii() and key.isprintable()) or " " in key for key in keys):
        raise UserError(f"{source} has a key that no header can hold: use printable ASCII characters without spaces")
    return [key.encode() for key in keys]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.")


def host_of(header: str) -> str:
    """Return the name or the address of a Host header, without the port."""
    return header[: header.find("]") + 1] if header.startswith("[") else header.partition(":")[0]


class Guard:
    """Wraps the application.

    Args:
        app: It.
        keys: Of which clients must show one; none are asked for where there are none.
        loopback: Whether the server is on a loopback address: then only names of this machine are taken as Host, so
            that no page of another site comes in by a name of its own that leads here.
        metrics: Counts answers.
        paths: Which it counts by name.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[bytes], loopback: bool, metrics: Metrics, paths: Collection[str]
    ) -> None:
        self.app, self.keys, self.metrics, self.paths = app, keys, metrics, paths
        self.names_only = loopback and not keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", CLOSED)
                self.metrics.requests.labels(self._known(scope["path"]), str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, sending)
        except ApiError as error:
            if not started:
                await respond(error)(scope, receive, sending)
        except Exception as error:
            print(log.line(f"internal error: {described(error)}", level="error"), file=sys.stderr, flush=True)
            if os.environ.get("LM_DEBUG"):
                traceback.print_exception(error)
            if not started:
                await respond(ApiError("internal error: the server's log has it", status=500))(scope, receive, sending)

    def _known(self, path: str) -> str:
        """Return a path for the figures, of which there are but a few."""
        return path if path in self.paths else "other"

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > LONGEST_HEADERS:
            raise ApiError(f"the headers have more than {LONGEST_HEADERS} bytes: shorten them", status=431)
        if self.names_only and not is_loopback(host_of(headers.get("host", "localhost"))):
            raise ApiError("the Host header names another machine: use localhost, or start with a key", status=403)
        if not self.keys or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        key = shown.strip().encode("latin-1", "replace")
        # each key is compared, so that the time tells nothing about which one it was
        fits = [hmac.compare_digest(key, one) for one in self.keys]
        if scheme.lower() != "bearer" or not any(fits):
            what = "is wrong" if shown else "is missing"
            text = f"the key {what}: send it as the header Authorization: Bearer KEY"
            raise ApiError(text, status=401, code="invalid_api_key")


class Origins(CORSMiddleware):
    """Tells browsers which other sites' pages may call the server; to all others it says no in OpenAI's shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer what a browser asks before it sends a page's request."""
        found = super().preflight_response(request_headers)
        refused = found.status_code >= 400
        return respond(ApiError(f"{bytes(found.body).decode()}: ask who runs this server")) if refused else found


def respond(error: ApiError) -> JSONResponse:
    """Return the answer that is an error; the connection ends, as more of the request may be on its way."""
    headers = error.headers | ({"connection": "close"} if error.status in (408, 413) else {})
    return JSONResponse(error.body, error.status, headers)


def failed(request: Any, error: Any) -> JSONResponse:
    """Return starlette's own errors in the protocol's shape: no such path, no such method."""
    advice = {404: "see /openapi.json for what there is", 405: "use another method"}.get(error.status_code, "see docs")
    text = f"{request.method[:20]} {request.url.path[:100]}: {error.detail}: {advice}"
    response = respond(ApiError(text, status=error.status_code))
    response.headers.update(error.headers or {})
    return response
