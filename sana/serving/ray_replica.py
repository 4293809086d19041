"""One replica: a pipeline, an engine and the application of the single server. How many there are is Ray's business."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

from sana.pipelines.options import InferenceOptions
from sana.serving.app import Message, Outside, Send, build_app
from sana.serving.engine import Engine
from sana.serving.extras import need, need_ray
from sana.serving.memory import keep_what_is_loaded, share_one_heap
from sana.serving.model import open_model
from sana.serving.service import Service
from sana.serving.settings import ServerSettings
from sana.serving.store import PictureStore
from sana.utils.logging import get_logger, setup_logging

logger = get_logger(__name__)

HEADER = b"x-sana-replica"
STORE_SECONDS = 10.0  # for the shared store to answer


class Replica:
    """What Ray runs, in a process of its own for each.

    Args:
        options: of the model.
        settings: of the server; its limits hold for each replica.
        store: handle of the one `PictureStore` that all replicas share.
        lower: see `open_model`.

    Raises:
        ValueError, ConfigError, FetchError, CheckpointError, OSError, MemoryLimitError: see `open_model`.
    """

    def __init__(self, options: InferenceOptions, settings: ServerSettings, store: Any, *, lower: bool = False) -> None:
        setup_logging()
        share_one_heap()
        self.name = str(need("ray.serve").get_replica_context().replica_tag)
        self.ending = False
        pipeline, settings = open_model(options, settings, lower=lower)
        self.settings = settings
        self.engine = Engine(pipeline, max_active=settings.max_active, max_queue=settings.max_queue)
        self.engine.__enter__()
        outside = build_app(Service(self.engine, settings), cast(PictureStore, SharedStore(need_ray(), store)))
        outside.metrics.registry = Labelled(outside.metrics.registry, replica=self.name)
        self.application = Signed(outside, self.name)
        keep_what_is_loaded()

    def __serve_build_asgi_app__(self) -> "Signed":
        """Returns what answers requests; called by Ray after the constructor."""
        return self.application

    def check_health(self) -> None:
        """Called by Ray now and then.

        Raises:
            RuntimeError: the engine broke; Ray puts another replica in the place of this one.
        """
        if not self.engine.alive and not self.ending:
            raise RuntimeError("The engine of this replica stopped.")

    async def finish(self) -> None:
        """Ends as the single server does: what is in work is finished, the rest is handed back, nothing more taken."""
        self.ending = True
        await asyncio.to_thread(self.engine.close, self.settings.grace_seconds)

    def __del__(self) -> None:
        """Called by Ray when this replica goes and has answered what it had taken."""
        if hasattr(self, "engine"):
            self.ending = True
            self.engine.close()


class SharedStore:
    """What a replica has in place of a `PictureStore`, so that each finds the pictures of the others.

    Args:
        ray: the package.
        store: handle of the actor.
    """

    def __init__(self, ray: Any, store: Any) -> None:
        self._ray, self._store = ray, store

    def put(self, png: bytes) -> str:
        """See `PictureStore.put`."""
        name: str = self._ray.get(self._store.put.remote(png), timeout=STORE_SECONDS)
        return name

    def get(self, name: str) -> bytes | None:
        """See `PictureStore.get`."""
        png: bytes | None = self._ray.get(self._store.get.remote(name), timeout=STORE_SECONDS)
        return png


class Signed:
    """An ASGI application whose answers name the replica that gave them.

    Args:
        app: the application.
        name: of the replica.
    """

    def __init__(self, app: Outside, name: str) -> None:
        self.app, self.name = app, name.encode("ascii")

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, self.name)]}
            await send(message)

        await self.app(scope, receive, signed)


class Labelled:
    """Prometheus' numbers with more labels: a scraper gets whichever replica answers, and must not mix them up.

    Args:
        registry: whose numbers.
        **labels: added to every number.
    """

    def __init__(self, registry: Any, **labels: str) -> None:
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterator[Any]:
        """Yields the families; called when a page is written."""
        for family in self._registry.collect():
            family.samples = [one._replace(labels={**one.labels, **self._labels}) for one in family.samples]
            yield family
