"""Cutting off slow clients, and errors in OpenAI's form instead of uvicorn's. The rest of HTTP/1.1 is uvicorn's."""

import json
from asyncio import BaseTransport, TimerHandle
from collections.abc import Awaitable, Callable
from typing import Any

from sana.serving.errors import SERVER, ApiError
from sana.serving.extras import need

NO_HTTP = ApiError(400, "This is no valid HTTP.", code="invalid_http", headers={"Connection": "close"})
FULL = ApiError(
    503, "Too many connections are open. Try again in 1 s.", SERVER, None, "too_many_connections",
    {"Connection": "close", "Retry-After": "1"},
)  # fmt: skip


def guarded_protocol(header_seconds: float, write_seconds: float) -> type:
    """Returns uvicorn's protocol with two more time limits, whose own answers (400, 503) have OpenAI's form.

    Args:
        header_seconds: from the first byte of a connection, or of a later request on it, to the end of its head.
            A body that nobody reads any more counts as a head too.
        write_seconds: that answers may wait in full buffers for the client to take some.

    Raises:
        ValueError: uvicorn is not installed.
    """
    base: Any = _answering_protocol()

    class GuardedProtocol(base):
        _head_timer: TimerHandle | None = None
        _write_timer: TimerHandle | None = None

        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            self._start_head_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answering():
                self._stop_head_timer()
            else:
                self._start_head_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._answering():  # the next request was in the buffer already
                self._stop_head_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_timer is None:
                self._write_timer = self.loop.call_later(write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _start_head_timer(self) -> None:
            if self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(header_seconds, self._head_too_slow)

        def _head_too_slow(self) -> None:
            self._head_timer = None
            if not self._answering():
                self.transport.abort()

        def _stop_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return GuardedProtocol


def _answering_protocol() -> type:
    """Returns uvicorn's protocol whose own answers have OpenAI's form."""
    module: Any = need("uvicorn.protocols.http.h11_impl")
    base: Any = module.H11Protocol
    h11 = module.h11

    class AnsweringProtocol(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._limit: int | None = self.config.limit_concurrency
            self.limit_concurrency = None  # uvicorn's own check does nothing then
            self._application: Any = self.app

        def handle_events(self) -> None:
            full = self._limit is not None and max(len(self.connections), len(self.tasks)) >= self._limit
            self.app = answer_full if full else self._application
            super().handle_events()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun: there is no other
                self.transport.abort()
                return
            content = _content(NO_HTTP)
            start = h11.Response(status_code=NO_HTTP.status, headers=_headers(NO_HTTP, content), reason=b"Bad Request")
            for event in (start, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

    return AnsweringProtocol


async def answer_full(scope: Any, receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """An ASGI application that says that there are too many connections."""
    content = _content(FULL)
    await send({"type": "http.response.start", "status": FULL.status, "headers": _headers(FULL, content)})
    await send({"type": "http.response.body", "body": content})


def _content(error: ApiError) -> bytes:
    return json.dumps(error.body()).encode()


def _headers(error: ApiError, content: bytes) -> list[tuple[bytes, bytes]]:
    about = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    return [(name.lower().encode(), value.encode()) for name, value in about.items()]
