"""The process: a socket, uvicorn on it, and the way it ends."""

import asyncio
import contextlib
import errno
import json
import logging
import math
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lm import log
from lm.errors import STOPS, Stopped, UserError, described, setting, take_stops
from lm.serving.errors import ApiError
from lm.serving.service import Service

BACKLOG = 2048


class Protocol(H11Protocol):
    """HTTP as uvicorn has it; what is no HTTP is answered in OpenAI's shape, and headers must arrive in time.

    Args:
        seconds: How long a request's headers may take.
        **settings: uvicorn's.
    """

    def __init__(self, *, seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds = seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for a first request."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            self._refuse(ApiError("there are too many connections: ask again later", status=503, retry_after=1))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what has come: of this request, or of one that follows on the same connection."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._unwatch()

    @property
    def _waiting(self) -> bool:
        """Whether no request is in work."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        """Set the time in which headers must have arrived, or what is left of a body that nobody reads."""
        if not self._waiting:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self._too_late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self._waiting and not self.transport.is_closing():
            self._refuse(ApiError("the headers did not arrive in time: send them faster", status=408))

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or a body that is none; within an answer, there is nothing left to say."""
        self._refuse(ApiError(f"{msg.rstrip('.')}: send HTTP/1.1", status=400))

    def _refuse(self, error: ApiError) -> None:
        silent = self._waiting or not self.cycle.response_started
        if silent and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body, phrase = json.dumps(error.body).encode(), HTTPStatus(error.status).phrase
            headers = {"content-type": "application/json", "connection": "close", "content-length": str(len(body))}
            lines = [f"{name}: {value}\r\n" for name, value in {**headers, **error.headers}.items()]
            self.transport.write(f"HTTP/1.1 {error.status} {phrase}\r\n{''.join(lines)}\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to `serve`."""

    def capture_signals(self) -> Any:
        """Take none."""
        return contextlib.nullcontext()


def most_connections() -> float:
    """Return how many connections there may be at once, of the files that this process may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if files == resource.RLIM_INFINITY else max(8, files - 64)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address.

    Raises:
        UserError: It cannot be had.
    """
    name = host.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{setting('host')} {host[:100]}: no address of this machine ({error})") from error
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)  # who comes while checkpoints are read waits
    except OSError as error:
        made.close()
        of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        what = f"{setting('port')} {port}" if of_port else f"{setting('host')} {host[:100]}"
        raise UserError(f"{what}: {error.strerror}: choose another") from error
    return made


def url_of(made: socket.socket) -> str:
    """Return a socket's address for a browser."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def telling_once() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return what asyncio calls when its own work fails: where no file is left, that is thousands of times."""
    said: set[str] = set()

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        text = described(context["exception"]) if "exception" in context else str(context["message"])
        if text not in said and len(said) < 100:
            said.add(text)
            print(log.line(f"internal error: {text}", level="error"), file=sys.stderr, flush=True)

    return tell


def serve(app: ASGIApp, service: Service, made: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until a signal comes; what runs then has the grace period to finish.

    Raises:
        Stopped: When all is done.
    """
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).disabled = True  # what matters to people is said by `Guard`
    grace = service.limits.grace
    http: Any = partial(Protocol, seconds=service.limits.body_timeout)  # uvicorn but calls it
    server = Server(
        uvicorn.Config(
            app, http=http, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            date_header=True, proxy_headers=False, h11_max_incomplete_event_size=32 << 10, backlog=BACKLOG,
            timeout_keep_alive=15, timeout_graceful_shutdown=int(grace) + 5,
        )
    )  # fmt: skip
    came: list[int] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def stop(signum: int, frame: Any) -> None:
            loop.call_soon_threadsafe(stopped, signum)

        def stopped(signum: int) -> None:
            came.append(signum)
            service.stopping = server.should_exit = True
            loop.call_later(0 if len(came) > 1 else grace, end)

        def end() -> None:
            for worker in service.workers.values():
                worker.end_all(ApiError("the server stops: ask another", status=503, code="stopping"))
            loop.call_later(1, abort)

        def abort() -> None:  # of clients that neither send nor read
            for connection in list(server.server_state.connections):
                connection.transport.abort()

        loop.set_exception_handler(telling_once())
        before = take_stops(stop)
        try:
            serving = asyncio.ensure_future(server.serve(sockets=[made]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if server.started:
                ready()
            await serving
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    asyncio.run(run())
    raise Stopped(came[0] if came else STOPS[-1])
