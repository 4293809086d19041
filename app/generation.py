"""Wishes of the page made into pictures: one after the other, with progress and cancel. No page is here.

A `Studio` holds the pipeline. Wishes wait in line; one thread at a time works, picture after picture, so that each
appears as soon as it is done and is the very picture that the pipeline makes of its seed alone.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from app.options import DemoOptions
from app.pictures import Picture, PictureFolder
from app.recipes import Settings
from app.safety_check import SafetyCheck
from app.wishes import Wish
from sana.pipelines import batch
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.options import InferenceOptions
from sana.pipelines.prompts import PromptItem
from sana.pipelines.recipe import Recipe
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.utils.logging import get_logger

logger = get_logger(__name__)

WAITING, CHECKING, LOADING, DRAWING, DECODING, DONE = "waiting", "checking", "loading", "drawing", "decoding", "done"
UNKNOWN = "The picture could not be made; the reason is in the log of the app."
NO_MEMORY = "The memory of the device does not suffice; a smaller size may fit."
NO_NUMBER = "The model produced values that are no numbers; another prompt or less guidance may help."
NO_SPACE = "The picture could not be stored; the disk of the app may be full."


class BusyError(RuntimeError):
    """No more wishes are taken now; the message is for the page."""


class _Cancelled(Exception):  # noqa: N818  no error: somebody changed their mind
    """Stops a computation from inside; never leaves this file."""


@dataclass(frozen=True)
class Progress:
    """Where a wish is.

    Attributes:
        phase: one of the constants of this file.
        place: wishes before it, while it waits.
        picture, pictures: number of the one in work, from 1, and of all.
        step, steps: steps taken of the picture in work, and all of it.
        share: of the steps of all pictures, from 0 to 1.
        elapsed: seconds since its work began.
        remaining: seconds left, estimated from the steps so far; None before there are two.
    """

    phase: str
    place: int = 0
    picture: int = 0
    pictures: int = 0
    step: int = 0
    steps: int = 0
    share: float = 0.0
    elapsed: float = 0.0
    remaining: float | None = None


@dataclass(eq=False)
class Job:
    """A wish on its way.

    Attributes:
        wish: what is asked for.
        owner: whose it is: a session of the page; None for a caller that has none.
        calls: of the pipeline.
        pictures: those that are finished, also of a wish that was cancelled.
        error: one sentence, where it failed or was refused.
        cancelled: whether somebody asked to stop it.
        on_change: called from any thread whenever something happened.
    """

    wish: Wish
    owner: str | None = None
    calls: int = 1
    pictures: list[Picture] = field(default_factory=list)
    error: str | None = None
    cancelled: bool = False
    on_change: Callable[[], None] = lambda: None
    ended: threading.Event = field(default_factory=threading.Event)
    place: int = 0
    _phase: str = WAITING
    _step: int = 0
    _began: float | None = None
    _ticks: list[float] = field(default_factory=list)  # when the first and the last step ended
    _taken: int = 0  # steps of all calls

    def progress(self) -> Progress:
        """Returns where it is now."""
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        remaining, whole = None, self.wish.steps * self.calls
        if len(self._ticks) == 2 and self._taken > 1:
            pace = (self._ticks[1] - self._ticks[0]) / (self._taken - 1)
            since = time.monotonic() - self._ticks[1]
            remaining = max(0.0, pace * (whole - self._taken) - since)
        return Progress(
            phase=DONE if self.ended.is_set() else self._phase,
            place=self.place,
            picture=min(len(self.pictures) + 1, self.wish.number),
            pictures=self.wish.number,
            step=self._step,
            steps=self.wish.steps,
            share=self._taken / whole,
            elapsed=elapsed,
            remaining=remaining,
        )

    def enter(self, phase: str, step: int = 0) -> None:
        """Says what is done now; called between all parts of the work.

        Raises:
            _Cancelled: somebody asked to stop.
        """
        if self.cancelled:
            raise _Cancelled
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if step > self._step:
            self._taken += step - self._step
            self._ticks = [self._ticks[0] if self._ticks else now, now]
        self._phase, self._step = phase, step
        self.on_change()

    def after_step(self, _pipeline: object, index: int, _time: float, _tensors: object) -> None:
        """The pipeline's `callback_on_step_end`."""
        step = min(index + 1, self.wish.steps)
        self.enter(DRAWING if step < self.wish.steps else DECODING, step)

    def add(self, pictures: Sequence[Picture]) -> None:
        """Takes finished pictures."""
        self.pictures += pictures
        if len(self.pictures) < self.wish.number:
            self._step = 0
        self.on_change()

    def end(self, error: str | None = None) -> None:
        """Ends it, with a sentence where it failed."""
        self.error = error if error is not None else self.error
        self.ended.set()
        self.on_change()


class Studio:
    """Makes pictures, one wish at a time.

    Args:
        pipeline: with its weights.
        options: limits, and how many pictures a call makes.
        safety: asked about every prompt before anything is drawn.
        folder: keeps the pictures.
        opened_with: the options that the pipeline was opened with, which recipes name; None for its weights alone.
    """

    def __init__(
        self,
        pipeline: SanaPipeline,
        options: DemoOptions,
        safety: SafetyCheck,
        folder: PictureFolder,
        opened_with: InferenceOptions | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.options = options
        self.safety = safety
        self.folder = folder
        self.settings = Settings.of(pipeline, opened_with)
        self.weights: str | None = None  # their hash, known with the first picture
        self._lock = threading.RLock()
        self._waiting: deque[Job] = deque()
        self._active: Job | None = None

    def submit(self, wish: Wish, owner: str | None = None, on_change: Callable[[], None] = lambda: None) -> Job:
        """Puts a wish in line.

        Args:
            wish: what is asked for, checked.
            owner: whose it is; each owner has one wish at a time.
            on_change: see `Job`.

        Raises:
            BusyError: the line is full, or the owner has a wish in it.
        """
        job = Job(wish, owner, math.ceil(wish.number / self.options.bs), on_change=on_change)
        with self._lock:
            here = [*self._waiting, *([self._active] if self._active else [])]
            if owner is not None and any(one.owner == owner and not one.cancelled for one in here):
                raise BusyError("This page is making pictures already; wait for them, or cancel them first.")
            if self._active is not None and len(self._waiting) >= self.options.max_queue:
                raise BusyError(f"The queue is full: {len(self._waiting)} wishes are waiting; try again in a minute.")
            self._waiting.append(job)
            self._next()
        return job

    def cancel(self, owner: str | None) -> int:
        """Stops the wishes of an owner: one in work after its step, those that wait at once. Returns their number."""
        with self._lock:
            mine = [job for job in (*self._waiting, self._active) if job is not None and job.owner == owner]
            for job in mine:
                self.drop(job)
        return len(mine)

    def drop(self, job: Job) -> None:
        """Stops one wish, as `cancel` does those of an owner."""
        with self._lock:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.end()
            self._count_places()

    def here(self) -> dict[str, Any]:
        """Returns what decides a picture beside the wish, by the recipe's names."""
        return self.settings.here(self.pipeline, self.weights)

    def close(self, timeout: float = 10.0) -> None:
        """Stops everything, waits for the step in work, and removes the pictures."""
        with self._lock:
            active = self._active
            for job in (*self._waiting, *([active] if active else [])):
                self.drop(job)
        if active is not None:
            active.ended.wait(timeout)
        self.folder.close()

    def _next(self) -> None:
        """Starts the wish at the head of the line, if nothing is in work."""
        with self._lock:
            if self._active is None and self._waiting:
                self._active = self._waiting.popleft()
                threading.Thread(target=self._work, args=(self._active,), name="sana-app", daemon=True).start()
            self._count_places()

    def _count_places(self) -> None:
        for place, job in enumerate(self._waiting, 1):
            if job.place != place:
                job.place = place
                job.on_change()

    def _work(self, job: Job) -> None:
        """Makes the pictures of one wish, then starts the next. An error of unknown kind ends in the thread's log."""
        error: str | None = UNKNOWN
        try:
            error = self._make(job)
        except _Cancelled:
            error = None
        except (NonFiniteError, MemoryError, torch.OutOfMemoryError, OSError) as problem:
            logger.warning("a wish failed: %s: %s", type(problem).__name__, problem)
            error = _sentence(problem)
        finally:
            with self._lock:
                self._active = None
                job.end(error)
                self._next()

    def _make(self, job: Job) -> str | None:
        """Returns None, or why the wish is refused."""
        wish = job.wish
        job.enter(CHECKING)
        refusal = self.safety.check(wish.full_prompt)
        if refusal is not None:
            return refusal
        job.enter(LOADING)
        for start in range(0, wish.number, self.options.bs):
            recipes = [self._recipe(wish, index) for index in range(start, min(start + self.options.bs, wish.number))]
            job.enter(DRAWING)
            images = self._draw(wish, recipes, job)
            job.add([self.folder.keep(image, recipe) for image, recipe in zip(images, recipes, strict=True)])
        return None

    def _recipe(self, wish: Wish, index: int) -> Recipe:
        item = PromptItem(id="", prompt=wish.full_prompt, negative_prompt=wish.full_negative_prompt or None)
        size = {"height": wish.height, "width": wish.width}
        recipe = batch.make_recipe(self.pipeline, self._options(wish), item, **size, seed=wish.seed + index)
        self.weights = recipe.weights
        return replace(recipe, made_with=self.settings.public(recipe.made_with))

    def _options(self, wish: Wish) -> InferenceOptions:
        return replace(
            self.settings.opened_with, step=wish.steps, cfg_scale=wish.guidance, pag_scale=wish.pag, seed=wish.seed
        )

    def _draw(self, wish: Wish, recipes: Sequence[Recipe], job: Job) -> list[Any]:
        request = self._options(wish).request(
            [recipe.prompt for recipe in recipes],
            height=wish.height,
            width=wish.width,
            negative_prompt=wish.full_negative_prompt or None,
            seed=[recipe.seed for recipe in recipes],
            output_type="pil",
            callback_on_step_end=job.after_step,
            progress_bar=False,
        )
        images: list[Any] = self.pipeline.generate(request)
        return images


def _sentence(problem: BaseException) -> str:
    """Returns what a stranger may read of an error."""
    if isinstance(problem, NonFiniteError):
        return NO_NUMBER
    return NO_SPACE if isinstance(problem, OSError) else NO_MEMORY
