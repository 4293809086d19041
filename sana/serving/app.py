"""The HTTP interface: addresses, keys, answers in OpenAI's form. What they mean is in `service.py`."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from sana import __version__
from sana.serving.body import CLOSE, ClientGoneError, read_body, until_gone
from sana.serving.errors import NO_RETRY, ApiError, internal, of_status
from sana.serving.extras import need
from sana.serving.keys import KeyRing
from sana.serving.metrics import Metrics
from sana.serving.service import Begun, Picture, Service, log_failure
from sana.serving.settings import ServerSettings
from sana.serving.store import PictureStore
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import Response

logger = get_logger(__name__)

GONE = 499  # what web servers write into their logs for a client that did not wait
MISTAKABLE = ApiError(400, "The request says in two ways where it ends.", code="invalid_http", headers=CLOSE)
CLOSED = "/v1/images/edits is not there yet; /v1/images/generations is."
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def build_app(service: Service, store: PictureStore) -> "Outside":
    """Returns the ASGI application of a started engine.

    Args:
        service: answers wishes.
        store: keeps pictures that are fetched later.

    Raises:
        ValueError: FastAPI or prometheus_client is not installed.
    """
    fastapi = need("fastapi")
    metrics = Metrics(service.engine.stats)
    api = Api(service, store, metrics)
    app = fastapi.FastAPI(title="Sana", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False  # an address that is nearly right is wrong
    keyed = [fastapi.Depends(api.check_key)]
    for path, answer in (("/health", api.health), ("/health/live", api.live), ("/health/ready", api.ready)):
        app.add_api_route(path, answer, methods=["GET"])
    app.add_api_route("/files/{name}", api.file, methods=["GET"])  # their names are as good as keys
    app.add_api_route("/metrics", api.metrics_page, methods=["GET"], dependencies=keyed)
    app.add_api_route("/v1/models", api.models, methods=["GET"], dependencies=keyed)
    app.add_api_route("/v1/models/{name}", api.model, methods=["GET"], dependencies=keyed)
    app.add_api_route("/v1/images/generations", api.generations, methods=["POST"], dependencies=keyed)
    app.add_api_route("/v1/images/edits", api.edits, methods=["POST"], dependencies=keyed)
    _answer_errors(app, service.settings)
    return Outside(app, metrics)


def _answer_errors(app: "FastAPI", settings: ServerSettings) -> None:
    """Gives every error OpenAI's form."""

    async def foreseen(_: "Request", error: Exception) -> "Response":
        assert isinstance(error, ApiError)
        return _error(error)

    async def chosen(_: "Request", error: Exception) -> "Response":
        return _error(of_status(getattr(error, "status_code", 400)))

    async def gone(_: "Request", error: Exception) -> "Response":
        return _response(b"", GONE)  # nobody reads it; it is counted

    async def unforeseen(_: "Request", error: Exception) -> "Response":
        return _error(internal(log_failure(error, settings)))

    app.add_exception_handler(ApiError, foreseen)
    app.add_exception_handler(need("starlette.exceptions").HTTPException, chosen)
    app.add_exception_handler(need("fastapi.exceptions").RequestValidationError, chosen)
    app.add_exception_handler(ClientGoneError, gone)
    app.add_exception_handler(Exception, unforeseen)


class Outside:
    """What stands around the application: counts requests, and keeps errors that were answered from going further.

    Args:
        app: an ASGI application.
        metrics: where requests are counted.
    """

    def __init__(self, app: "FastAPI", metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http":
            return
        started, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await (_error(MISTAKABLE) if mistakable(scope) else self.app)(scope, receive, watched)
        except Exception:
            if not status:  # nothing was answered, so the server below must end the connection
                raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            self.metrics.answered(route, status or GONE, seconds)
            logger.info("%s %s %d %.3f s", scope["method"] if route != "other" else "-", route, status or GONE, seconds)


def mistakable(scope: Message) -> bool:
    """Whether a proxy in front could see another end of the request than this server (RFC 9112, section 6.1)."""
    names = {name for name, _ in scope["headers"]}
    return b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0")


class Api:
    """The answers. No method knows a prompt, a path or a key longer than it needs to.

    Args:
        service: does the work.
        store: keeps pictures.
        metrics: what `/metrics` shows.
    """

    def __init__(self, service: Service, store: PictureStore, metrics: Metrics) -> None:
        self.service, self.store, self.metrics = service, store, metrics
        self.keys = KeyRing(service.settings.api_keys)
        self.created = int(time.time())
        # FastAPI reads the signatures of what it calls, and these classes are imported when the server starts.
        request = need("fastapi").Request
        for function in (Api.check_key, Api.file, Api.model, Api.generations):
            function.__annotations__["request"] = request

    async def check_key(self, request: "Request") -> None:  # async: FastAPI would run it in a thread of its own
        self.keys.check(request.headers.get("authorization"))

    async def health(self) -> "Response":
        live, ready = self.service.engine.alive, self.service.engine.ready
        status = "ok" if ready else "stopping" if live else "failed"
        return _json({"status": status, "live": live, "ready": ready}, 200 if ready else 503)

    async def live(self) -> "Response":
        live = self.service.engine.alive
        return _json({"live": live}, 200 if live else 503)

    async def ready(self) -> "Response":
        ready = self.service.engine.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def metrics_page(self) -> "Response":
        page, kind = self.metrics.page()
        return _response(page, 200, kind)

    async def models(self) -> "Response":
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: "Request") -> "Response":
        if request.path_params["name"] != self.service.model:
            raise ApiError(404, f"This server has the model {self.service.model!r} only.", code="model_not_found")
        return _json(self._model())

    async def file(self, request: "Request") -> "Response":
        png = await asyncio.to_thread(self.store.get, request.path_params["name"])
        if png is None:
            raise of_status(404)
        return _response(png, 200, "image/png", {"Cache-Control": "private, max-age=3600"})

    async def edits(self) -> "Response":
        raise ApiError(501, CLOSED, code="not_implemented", headers={"Connection": "close", **NO_RETRY})

    async def generations(self, request: "Request") -> "Response":
        settings = self.service.settings
        self.service.check_open()
        body = await read_body(request.receive, request.headers, limit=settings.max_body, seconds=settings.body_seconds)
        wish = self.service.wish(body)
        if wish.stream:
            return self._stream(self.service.begin(wish))
        pictures = await self.service.make(wish, lambda: until_gone(request.receive))
        data = [await self._datum(one, wish.response_format, request) for one in pictures]
        first = pictures[0]
        about = {"size": f"{first.width}x{first.height}", "output_format": "png", "background": "opaque"}
        return _json({"created": int(time.time()), "data": data, **about})

    async def _datum(self, picture: Picture, form: str, request: "Request") -> dict[str, Any]:
        if form == "b64_json":
            return {"b64_json": picture.base64, "seed": picture.seed}
        base = (self.service.settings.public_url or str(request.base_url)).rstrip("/")
        name = await asyncio.to_thread(self.store.put, picture.png)  # a disk, or another machine
        return {"url": f"{base}/files/{name}", "seed": picture.seed}

    def _stream(self, begun: Begun) -> "Response":
        """Returns an answer that tells events; however it ends, the jobs end with it."""
        engine, follow, settings = self.service.engine, self.service.follow, self.service.settings

        class EventStream(need("fastapi.responses").StreamingResponse):  # type: ignore[misc]
            async def __call__(self, *args: Any) -> None:
                try:
                    await super().__call__(*args)
                finally:
                    engine.cancel(begun.jobs)

        async def lines() -> AsyncIterator[bytes]:
            try:
                async for event in follow(begun):
                    yield _event(event)
            except Exception as error:
                yield _event(internal(log_failure(error, settings)).body())
                raise

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response: Response = EventStream(lines(), media_type="text/event-stream", headers=headers)
        return response

    def _model(self) -> dict[str, Any]:
        return {"id": self.service.model, "object": "model", "created": self.created, "owned_by": "sana"}


def _event(event: dict[str, Any] | None) -> bytes:
    """Returns a server-sent event; of None a comment, which readers skip."""
    if event is None:
        return b": waiting\n\n"
    name = event.get("type", "error")
    return f"event: {name}\ndata: {json.dumps(event)}\n\n".encode()


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    return _response(json.dumps(content).encode(), status, "application/json", headers)


def _error(error: ApiError) -> "Response":
    return _json(error.body(), error.status, error.headers)


def _response(
    content: bytes, status: int, kind: str | None = None, headers: dict[str, str] | None = None
) -> "Response":
    safe = {"X-Content-Type-Options": "nosniff", **(headers or {})}
    made: Response = need("fastapi.responses").Response(content, status, safe, kind)
    return made
