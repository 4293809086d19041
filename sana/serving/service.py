"""From a checked wish to pictures and events: submits to the engine, waits, gives up. HTTP itself is in `app.py`."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.images import to_pil
from sana.serving.body import ClientGoneError
from sana.serving.engine import Engine, QueueFullError
from sana.serving.errors import NO_RETRY, SERVER, ApiError, busy, internal, invalid, too_slow, unavailable
from sana.serving.job import CancelledError, HandedBackError, Job, JobOptions, Step
from sana.serving.pictures import as_png, model_name, recipe_of
from sana.serving.settings import ServerSettings
from sana.serving.wishes import Wish, parse_body, parse_wish
from sana.utils.logging import get_logger

logger = get_logger(__name__)

HEARTBEAT_SECONDS = 10.0
RETRY_ELSEWHERE = 5  # seconds after which a client of a stopping server may ask again
STOPPING = "The server is shutting down."


@dataclass(frozen=True)
class Picture:
    """A finished picture: its file's bytes, seed, height and width."""

    png: bytes
    seed: int
    height: int
    width: int

    @property
    def base64(self) -> str:
        """The file as text."""
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Begun:
    """Jobs of a streamed wish, and the events they send: (index of the picture, step), or None when it is finished."""

    jobs: list[Job]
    events: "asyncio.Queue[tuple[int, Step | None]]"


def log_failure(error: BaseException, settings: ServerSettings) -> str:
    """Logs an error that nobody foresaw, by kind only unless `debug`; returns the number by which it can be found."""
    number = secrets.token_hex(4)
    logger.error("failure %s: %s", number, type(error).__name__, exc_info=error if settings.debug else None)
    return number


class Service:
    """What the server does, for one engine.

    Args:
        engine: started.
        settings: limits and waiting times.

    Attributes:
        model: the name that clients use.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.model = settings.model_name or model_name(engine.pipeline)

    def wish(self, body: bytes) -> Wish:
        """Returns what a body asks for.

        Raises:
            ApiError: it cannot be.
        """
        image_size = self.engine.pipeline.config.model.image_size
        return parse_wish(parse_body(body), self.settings, self.model, image_size)

    def check_open(self) -> None:
        """Says early that nothing is taken any more.

        Raises:
            ApiError: 503.
        """
        if not self.engine.ready:
            raise unavailable(STOPPING, RETRY_ELSEWHERE)

    async def make(self, wish: Wish, gone: Callable[[], Awaitable[None]]) -> list[Picture]:
        """Makes the pictures of a wish.

        Args:
            wish: what.
            gone: returns when nobody waits any more.

        Raises:
            ApiError: they could not be made, or not in time.
            ClientGoneError: `gone` came first; the pictures were given up.
        """
        jobs = self._submit(wish, [JobOptions()] * wish.n)
        leaving = asyncio.ensure_future(gone())
        making = asyncio.gather(*(self._finish(job) for job in jobs))
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                await asyncio.wait((leaving, making), return_when=asyncio.FIRST_COMPLETED)
                if not making.done():
                    raise ClientGoneError
                return list(making.result())
        except TimeoutError:
            raise too_slow(self.settings.request_seconds) from None
        finally:
            leaving.cancel()
            making.cancel()
            self.engine.cancel(jobs)
            del making  # its error has a traceback, which holds this frame: a circle

    def begin(self, wish: Wish) -> Begun:
        """Submits a wish whose progress is wanted. Whoever begins it must cancel its jobs in the end.

        Raises:
            ApiError: it is not taken.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Step | None]] = asyncio.Queue()

        def tell(index: int, step: Step | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, step))

        def finished(index: int, _: object) -> None:
            tell(index, None)

        options = [JobOptions(on_step=partial(tell, index), previews=wish.partial_images) for index in range(wish.n)]
        jobs = self._submit(wish, options)
        for index, job in enumerate(jobs):
            job.future.add_done_callback(partial(finished, index))
        return Begun(jobs, events)

    async def follow(self, begun: Begun) -> AsyncIterator[dict[str, Any] | None]:
        """Yields the events of a begun wish, None as a sign of life, and at last every finished picture or an error."""
        end = time.monotonic() + self.settings.request_seconds
        waiting = len(begun.jobs)
        shown = [0] * waiting
        while waiting:
            left = end - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, min(left, HEARTBEAT_SECONDS))):
                    index, step = await begun.events.get()
            except TimeoutError:
                if left > HEARTBEAT_SECONDS:
                    yield None
                    continue
                yield too_slow(self.settings.request_seconds).body()
                return
            if step is not None:
                about = {"image_index": index, "step": step.done, "steps": step.total}
                yield {"type": "image_generation.progress", **about}
                if step.preview is not None:
                    png = await asyncio.to_thread(as_png, to_pil(step.preview)[0])
                    about = self._about(begun.jobs[index], index, png)
                    yield {"type": "image_generation.partial_image", "partial_image_index": shown[index], **about}
                    shown[index] += 1
                continue
            try:
                picture = await self._finish(begun.jobs[index])
            except ApiError as error:
                yield error.body()
                return
            waiting -= 1
            yield {"type": "image_generation.completed", **self._about(begun.jobs[index], index, picture.png)}

    def _submit(self, wish: Wish, options: list[JobOptions]) -> list[Job]:
        try:
            return self.engine.submit(wish.requests(), options)
        except QueueFullError as error:
            raise busy(error.retry_after) from error
        except HandedBackError as error:
            raise unavailable(STOPPING, RETRY_ELSEWHERE) from error
        except ValueError as error:
            raise invalid(None, str(error)) from error

    async def _finish(self, job: Job) -> Picture:
        waited = asyncio.wrap_future(job.future)
        waited.add_done_callback(lambda one: one.cancelled() or one.exception())  # seen, though nobody may wait
        await asyncio.wait([waited])
        error = waited.exception()
        if error is not None:
            raise self._explained(error) from error
        (image,) = waited.result()
        pipeline, seed = self.engine.pipeline, job.request.seed
        assert isinstance(seed, int), "every wish has a seed"
        png = await asyncio.to_thread(lambda: as_png(image, recipe_of(pipeline, job, self.model)))
        return Picture(png, seed, image.height, image.width)

    def _explained(self, error: BaseException) -> ApiError:
        """Returns what a client is told of a picture that was not made."""
        if isinstance(error, HandedBackError | CancelledError):
            return unavailable(STOPPING, RETRY_ELSEWHERE)
        if isinstance(error, NonFiniteError):
            return ApiError(500, "The model made no valid picture.", SERVER, code="not_finite", headers=NO_RETRY)
        if isinstance(error, torch.OutOfMemoryError):
            return ApiError(503, "There is not enough memory for this size.", SERVER, "size", "out_of_memory")
        return internal(log_failure(error, self.settings))

    @staticmethod
    def _about(job: Job, index: int, png: bytes) -> dict[str, Any]:
        """Returns the fields that OpenAI's events with a picture have, and ours."""
        return {
            "b64_json": base64.b64encode(png).decode("ascii"),
            "created_at": int(time.time()),
            "size": f"{job.size.width}x{job.size.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": "png",
            "image_index": index,
            "seed": job.request.seed,
        }
