"""The application: its paths, and the way of a request from bytes to an answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lm.serving import answers, openapi, page, probes
from lm.serving.calls import Call, parse
from lm.serving.errors import ApiError
from lm.serving.guard import Guard, Origins, failed, respond
from lm.serving.service import Service
from lm.serving.values import loads

Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


class Gone(Exception):  # noqa: N818
    """The client has gone: nobody waits for an answer."""


async def read_json(request: Request, service: Service) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        ApiError: It is none, too large, or does not arrive in time.
        Gone: The client has.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send any other without asking
        raise ApiError(f"content-type is {kind[:80]!r}: send application/json", status=415)
    most, body = service.limits.max_body_bytes, bytearray()
    try:
        async with asyncio.timeout(service.limits.body_timeout):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(f"the body has more than {most} bytes: shorten it", status=413)
    except TimeoutError as error:
        raise ApiError("the body did not arrive in time: send it faster", status=408) from error
    except ClientDisconnect as error:
        raise Gone from error
    return loads(bytes(body))


async def gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do some work; stop it when the client has gone."""
    doing, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not doing.done():
            doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await doing


class Generation:
    """The endpoint of completions, or of chats.

    Args:
        service: Makes the texts.
        chat: Which of them.
    """

    def __init__(self, service: Service, *, chat: bool) -> None:
        self.service, self.chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive)
        try:
            self.service.check_room()
            call = parse(await read_json(request, self.service), self.chat, self.service.limits)
        except Gone:
            return
        await until_gone(self._answer(call, scope, receive, send), receive)

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        started, job, worker = False, None, self.service.worker(call.model)
        try:
            async with asyncio.timeout(self.service.limits.timeout):
                shape, texts, job = await self.service.start(call)
                if not call.stream:
                    await JSONResponse(await answers.whole(shape, texts, job))(scope, receive, send)
                    return
                async for part in answers.events(shape, texts, job):
                    if not started:
                        await send(_event_stream())
                        started = True
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, ApiError) as error:
            if isinstance(error, TimeoutError):
                text = f"it took more than {self.service.limits.timeout:g} seconds: ask for less"
                error = ApiError(text, status=504, code="timeout")
            if not started:
                raise error from None
            with contextlib.suppress(TimeoutError):  # of a client that reads no more
                async with asyncio.timeout(1):
                    last = answers.event(error.body)
                    await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            if job is not None:
                worker.cancel(job)


def _event_stream() -> dict[str, Any]:
    headers = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


def _routes(service: Service) -> list[Route]:
    """Return the paths and what answers them."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    async def model(request: Request) -> Response:
        return JSONResponse(service.model(request.path_params["name"]))

    async def health(request: Request) -> Response:
        if service.well:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopping" if service.stopping else "failed"}, 503)

    async def metrics(request: Request) -> Response:
        engines = {name: worker.engine for name, worker in service.workers.items()}
        return Response(service.metrics.text(engines), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def front(request: Request) -> Response:
        return HTMLResponse(page.TEXT, headers={"content-security-policy": page.POLICY})

    async def document(request: Request) -> Response:
        return JSONResponse(openapi.document(service.limits))

    def posted(probe: Callable[[Service, dict[str, Any]], Coroutine[Any, Any, Any]]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            try:
                body = await read_json(request, service)
                with service.place():
                    return JSONResponse(await probe(service, body))
            except Gone:
                return Response(status_code=408)

        return endpoint

    return [
        Route("/v1/completions", Generation(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Generation(service, chat=True), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/tokenize", posted(probes.tokenize), methods=["POST"]),
        Route("/attention", posted(probes.attention), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", document),
        Route("/", front),
    ]


def make_app(service: Service, *, keys: Sequence[bytes], loopback: bool, origins: Sequence[str]) -> ASGIApp:
    """Return the application.

    Args:
        service: What it serves.
        keys: Of which clients must show one, if there are any.
        loopback: Whether only this machine reaches it.
        origins: Of pages of other sites that may call it.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for worker in service.workers.values():
            worker.start()
        yield
        await service.templates.close()

    async def api_error(request: Request, error: Any) -> Response:
        return respond(error)

    async def http_error(request: Request, error: Any) -> Response:
        return failed(request, error)

    routes = _routes(service)
    app: ASGIApp = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={ApiError: api_error, HTTPException: http_error}
    )
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    app = Guard(app, keys=keys, loopback=loopback, metrics=service.metrics, paths={one.path for one in routes})
    if origins:
        headers = ["authorization", "content-type"]
        app = Origins(app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=headers)
    return app
