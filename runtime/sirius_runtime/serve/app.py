"""The HTTP routes: OpenAI's API, health and metrics, and the demo page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sirius_runtime.model import SiriusModel
from sirius_runtime.serve.calls import Call, Defaults, encode, make_call
from sirius_runtime.serve.engine import Engine
from sirius_runtime.serve.metrics import Metrics
from sirius_runtime.serve.protocol import ApiError, ChatRequest, CompletionRequest

_log = logging.getLogger("sirius.serve")
_GONE = 499  # nginx's status for "client closed request"; no client reads it
_FOLDER = Path(__file__).parent / "page"
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Served:
    """A model served under a name. most_bytes: the largest request body. draining: no new requests
    are taken.
    """

    model: SiriusModel
    name: str
    engine: Engine
    metrics: Metrics
    defaults: Defaults
    api_key: str | None = None
    most_bytes: int = 2**23
    draining: bool = False


def make_app(served: Served) -> FastAPI:
    """The ASGI application; it starts the engine and stops it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await run_in_threadpool(served.engine.stop)

    app = FastAPI(title="sirius serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=served.most_bytes)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    created = int(time.time())
    model_card = {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "sirius",
        "max_model_len": served.engine.capacity.context,
    }

    def authorized(request: Request) -> None:
        if served.api_key is None:
            return
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {served.api_key}".encode()):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key"
            )

    key = [Depends(authorized)]

    async def complete(asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        _check_model(served, asked.model)
        if served.draining:
            raise ApiError(503, "the server is stopping", code="stopping")
        # In a thread, because tokenizing a long text would hold up the other streams.
        prompts = await run_in_threadpool(encode, served.model, asked)
        call = make_call(served.model, served.name, served.engine, served.defaults, asked, prompts)
        try:
            call.submit()
        except ApiError as error:
            if error.status == 429:
                served.metrics.refused()
            raise
        if asked.stream:
            return EventStream(call)
        return await _unless_gone(request, call)

    @app.post("/v1/chat/completions", dependencies=key)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await complete(asked, request)

    @app.post("/v1/completions", dependencies=key)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await complete(asked, request)

    @app.get("/v1/models", dependencies=key)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}", dependencies=key)
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(served, name)
        return model_card

    @app.get("/health")
    async def health() -> Response:
        """Liveness: if it fails, restart the server."""
        return _state(served.engine.alive, "the engine has stopped")

    @app.get("/ready")
    async def ready() -> Response:
        """Readiness: whether the server takes requests."""
        return _state(served.engine.alive and not served.draining, "the server is stopping")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    for path, (name, kind) in _PAGE.items():
        content = (_FOLDER / name).read_bytes()
        app.get(path, include_in_schema=False)(_file(content, kind))

    return app


class EventStream(Response):
    """A call's response objects as server-sent events. When the client disconnects, the call is
    cancelled at once, also while there is nothing to send.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            self._call.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._call.chunks():
            await self._event(send, _json(chunk))
        await self._event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, send: Send, data: str) -> None:
        body = f"data: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


class BodyLimit:
    """Refuses request bodies of more than `most` bytes without reading them to their end."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                text = f"the body has more than {self._most} bytes: send less"
                await _respond(ApiError(413, text, code="too_large"))(scope, receive, send)
                return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()

        await self._app(scope, again, send)


async def _unless_gone(request: Request, call: Call) -> Response:
    """The whole response of a call; if the client disconnects first, the call is cancelled."""
    whole = asyncio.ensure_future(call.whole())
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({whole, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=_GONE)
        return Response(_json(whole.result()), media_type="application/json")
    finally:
        for task in (whole, leaving):
            task.cancel()
        call.cancel()


async def _left(receive: Callable[[], Awaitable[Message]]) -> None:
    """Returns once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=kind, headers=headers)

    return file


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        raise ApiError(
            404,
            f"the model {name[:100]!r} is not served here; {served.name!r} is",
            code="model_not_found",
            param="model",
        )


def _state(good: bool, otherwise: str) -> Response:
    if good:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": otherwise}, status_code=503)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _respond(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _respond(error)


async def _on_wrong_request(request: Request, error: Exception) -> Response:
    """Answers a request with bad JSON, wrong types or unknown fields: it names the first fault."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return _respond(ApiError(400, "the body is not JSON: send one object as JSON"))
    if first["type"] == "extra_forbidden":
        name = ".".join(place)
        return _respond(
            ApiError(400, f"{name}: not a known field; leave it out", code="unknown", param=name)
        )
    param = ".".join(place) or None
    text = f"{param or 'the body'}: {first['msg']}"
    return _respond(ApiError(400, text, code="wrong_value", param=param))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _respond(ApiError(error.status_code, f"{request.url.path}: {error.detail}"))


async def _on_bug(request: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    return _respond(ApiError(500, "an internal error of the server", code="internal_error"))
