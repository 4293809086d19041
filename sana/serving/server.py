"""Running the server in this process: socket, signals, a graceful end. What it answers is in `app.py`."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

from sana.pipelines.options import InferenceOptions
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving.app import build_app
from sana.serving.engine import Engine
from sana.serving.extras import need, need_all
from sana.serving.model import open_model
from sana.serving.protocol import guarded_protocol
from sana.serving.service import Service
from sana.serving.settings import LOOPBACK, ServerSettings
from sana.serving.store import PictureStore
from sana.utils.logging import get_logger

logger = get_logger(__name__)

BACKLOG = 512
HEAD_BYTES = 16 * 1024
KEEP_ALIVE_SECONDS = 5
LAST_WORDS_SECONDS = 10  # for answers that are on their way when everything else has ended


class Server:
    """A pipeline behind HTTP.

    Args:
        pipeline: with weights; nobody else may use it meanwhile.
        settings: limits; the defaults serve this machine only.

    Raises:
        ValueError: the extra `serve` is not installed, or the pipeline cannot be served.
    """

    def __init__(self, pipeline: SanaPipeline, settings: ServerSettings | None = None) -> None:
        need_all()
        self.settings = settings or ServerSettings()
        self.engine = Engine(pipeline, max_active=self.settings.max_active, max_queue=self.settings.max_queue)
        self._uvicorn: Any = None

    def run(self, on_ready: Callable[[str], None] | None = None) -> int:
        """Serves until SIGTERM, SIGINT or `stop`.

        Args:
            on_ready: called with the server's address as soon as it is open.

        Returns:
            0, the exit code of a process that was asked to end.

        Raises:
            OSError: it cannot listen at that address.
        """
        settings = self.settings
        with ExitStack() as stack:
            listener = stack.enter_context(listen(settings.host, settings.port))
            stack.enter_context(self.engine)
            store = stack.enter_context(PictureStore(settings.keep_files, settings.keep_bytes, settings.keep_seconds))
            app = build_app(Service(self.engine, settings), store)
            self._uvicorn = _graceful(self.engine, settings)(_config(app, settings))
            warn_if_open(settings)
            if on_ready is not None:
                on_ready(address(listener))
            self._uvicorn.run(sockets=[listener])
        return 0

    def stop(self) -> None:
        """Ends `run` as SIGTERM does; from any thread."""
        if self._uvicorn is not None:
            self._uvicorn.ask_to_end()


def serve(
    options: InferenceOptions,
    settings: ServerSettings,
    on_ready: Callable[[str], None] | None = None,
    *,
    lower: bool = False,
) -> int:
    """Loads a model and serves it until the process is asked to end.

    Args:
        options: which model, on what device, in what dtype, how its weights are kept, and what memory there is;
            the fields that describe pictures have no effect.
        settings: of the server.
        on_ready: see `Server.run`.
        lower: see `open_model`.

    Returns:
        The exit code.

    Raises:
        ValueError: the extra `serve` is missing, or an option is wrong.
        ConfigError, FetchError, CheckpointError, OSError: the model cannot be had, or the address not be listened at.
        MemoryLimitError: the pictures do not fit into `max_vram`; nothing was loaded.
    """
    need_all()
    pipeline, settings = open_model(options, settings, lower=lower)
    return Server(pipeline, settings).run(on_ready)


def warn_if_open(settings: ServerSettings) -> None:
    """Says that everybody may use a server, where that is so."""
    if not settings.api_keys and settings.host not in (LOOPBACK, "::1", "localhost"):
        logger.warning("listening on %s without API keys: whoever reaches it can use it", settings.host)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that accepts connections already, though nobody answers yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def address(listener: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return url(host, port)


def url(host: str, port: int) -> str:
    """Returns the URL of an address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(app: Any, settings: ServerSettings) -> Any:
    return need("uvicorn").Config(
        app,
        http=guarded_protocol(settings.header_seconds, settings.write_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # its lines could hold what clients wrote; requests are logged by the application
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )


def _graceful(engine: Engine, settings: ServerSettings) -> type:
    """Returns uvicorn's server with an end in two parts: first no more work, then no more connections.

    While pictures are finished it goes on answering: requests get 503 and a time, /health says that it stops.
    A second signal does not wait for pictures.
    """

    class GracefulServer(need("uvicorn").Server):  # type: ignore[misc]
        _event_loop: asyncio.AbstractEventLoop | None = None
        _asked = False
        _ending: "asyncio.Task[None] | None" = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            self._event_loop = asyncio.get_running_loop()
            if self._asked:
                self._begin_to_end()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self._asked:
                self.force_exit = self.should_exit = True
            self.ask_to_end()

        def ask_to_end(self) -> None:
            self._asked = True
            if self._event_loop is not None:
                self._event_loop.call_soon_threadsafe(self._begin_to_end)

        def _begin_to_end(self) -> None:
            if self._ending is None:
                logger.info("asked to end: finishing %d pictures", engine.stats().active)
                self._ending = asyncio.ensure_future(self._end())

        async def _end(self) -> None:
            await asyncio.to_thread(engine.close, settings.grace_seconds)
            self.should_exit = True

    return GracefulServer
