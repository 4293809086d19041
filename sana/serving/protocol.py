"""Cutting off clients that send their head, or take their answer, too slowly. The rest of HTTP/1.1 is uvicorn's."""

from asyncio import BaseTransport, TimerHandle
from typing import Any

from sana.serving.extras import need


def guarded_protocol(header_seconds: float, write_seconds: float) -> type:
    """Returns uvicorn's protocol with two more time limits.

    Args:
        header_seconds: from the first byte of a connection, or of a later request on it, to the end of its head.
            A body that nobody reads any more counts as a head too.
        write_seconds: that answers may wait in full buffers for the client to take some.

    Raises:
        ValueError: uvicorn is not installed.
    """
    base: Any = need("uvicorn.protocols.http.h11_impl").H11Protocol

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
