"""The process: a socket, uvicorn on it, and the way it ends."""

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lm.errors import STOPS, Stopped, UserError, setting, take_stops
from lm.serving.errors import ApiError
from lm.serving.service import Service

BACKLOG = 2048


class Protocol(H11Protocol):
    """HTTP as uvicorn has it; what is no HTTP is answered in OpenAI's shape, and headers must arrive in time."""

    HEADER_SECONDS = 30.0

    def connection_made(self, transport: Any) -> None:
        """Wait for a first request."""
        super().connection_made(transport)
        self.loop.call_later(self.HEADER_SECONDS, self._too_late)

    def _too_late(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self._refuse(ApiError("the headers did not arrive in time: send them faster", status=408))

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; within an answer, there is nothing left to say."""
        self._refuse(ApiError(f"{msg.rstrip('.')}: send HTTP/1.1", status=400))

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and (
            self.cycle is None or self.cycle.response_complete
        ):
            body, phrase = json.dumps(error.body).encode(), HTTPStatus(error.status).phrase
            head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to `serve`."""

    def capture_signals(self) -> Any:
        """Take none."""
        return contextlib.nullcontext()


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


def serve(app: ASGIApp, service: Service, made: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until a signal comes; what runs then has the grace period to finish.

    Raises:
        Stopped: When all is done.
    """
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).disabled = True  # what matters to people is said by `Guard`
    grace = service.limits.grace
    server = Server(
        uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
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
