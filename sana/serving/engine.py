"""Continuous batching: requests join and leave between denoising steps. HTTP is not here.

One thread, the engine's, computes everything. Every request in work is a coroutine that runs the pipeline's own code
and asks for the networks (`stepping.py`). A round answers the question of every coroutine, those for the transformer
together where they fit (`evaluation.py`). On a CPU a picture therefore has the very bits of `SanaPipeline`'s.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving.coroutine import Coroutine, Outcome
from sana.serving.evaluation import Evaluator, attempt
from sana.serving.job import CancelledError, HandedBackError, Job, JobOptions
from sana.serving.memory import give_back
from sana.serving.stepping import Do, SteppedPipeline
from sana.serving.throughput import Throughput
from sana.serving.workers import release_workers, work_alone

GIVE_BACK_SECONDS = 10.0  # in work, and without any, after which free pages of the heap go back to the system


class QueueFullError(RuntimeError):
    """There is no room for the request now.

    Attributes:
        retry_after: seconds until there should be.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The queue is full; try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineStats:
    """What the engine did and has to do. All but the first two only grow.

    Attributes:
        queued, active: pictures that wait, and that are in work.
        steps: answered questions for the transformer: one a picture and step.
        forwards: calls of the transformer that this took.
        images, failed, cancelled, handed_back, rejected: pictures by their end.
    """

    queued: int = 0
    active: int = 0
    steps: int = 0
    forwards: int = 0
    images: int = 0
    failed: int = 0
    cancelled: int = 0
    handed_back: int = 0
    rejected: int = 0


@dataclass(eq=False)
class _Run:
    job: Job
    coroutine: Coroutine


class Engine:
    """Makes pictures for many at once. A context manager; `submit` may be called from any thread.

    Args:
        pipeline: with weights, not compiled. Nobody else may use it meanwhile.
        max_active: pictures in work at a time. On a CPU more do not finish sooner; they share it more evenly.
        max_queue: pictures that may wait.
        join: see `Evaluator`; changes bits, not pictures.
        clock: returns seconds.

    Raises:
        ValueError: the pipeline has no weights or is compiled, or a number is not positive.
    """

    def __init__(
        self,
        pipeline: SanaPipeline,
        *,
        max_active: int = 8,
        max_queue: int = 64,
        join: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if pipeline.transformer is None:
            raise ValueError("The pipeline has no weights yet; call from_pretrained(model_path) first.")
        if pipeline._compiled is not None:
            raise ValueError("A compiled pipeline runs its loop as one piece and cannot be stepped; compile('off').")
        if min(max_active, max_queue) < 1:
            raise ValueError(f"max_active {max_active} and max_queue {max_queue} must be at least 1.")
        self.pipeline, self.max_active, self.max_queue = pipeline, max_active, max_queue
        self._evaluator = Evaluator(pipeline.transformer, join=join)
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._active: list[_Run] = []
        self._stats = EngineStats()
        self._throughput = Throughput()
        self._given_back = clock()
        self._draining = self._closing = False
        self._loop: Future[None] | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Loads what the pipeline loads late, and starts."""
        _ = self.pipeline.autoencoder, self.pipeline.text_encoder, self.pipeline.weights_hash()
        release_workers()
        self._threads = ThreadPoolExecutor(self.max_active + 1, thread_name_prefix="sana-engine")
        self._loop = self._threads.submit(self._work)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs: False before the start, after the end, and when the device broke."""
        return self._loop is not None and not self._loop.done()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.alive and not self._draining

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is in work."""
        with self._changed:
            return not self._queue and not self._active

    def stats(self) -> EngineStats:
        """Returns the counters as they are now."""
        with self._changed:
            return replace(
                self._stats,
                queued=len(self._queue),
                active=len(self._active),
                forwards=self._evaluator.forwards,
            )

    def submit(self, requests: Sequence[Request], options: Sequence[JobOptions] | None = None) -> list[Job]:
        """Takes requests of one picture each: all of them or none.

        Args:
            requests: what is wanted.
            options: one for each request, or None.

        Returns:
            One job each; `job.future` has the result.

        Raises:
            ValueError: a request cannot be made.
            QueueFullError: there is no room for all of them.
            HandedBackError: the engine does not take requests any more.
        """
        jobs = [
            Job(self.pipeline, request, options[index] if options else None) for index, request in enumerate(requests)
        ]
        with self._changed:
            if not self.ready:
                raise HandedBackError("The engine takes no more requests.")
            free = self.max_queue + max(0, self.max_active - len(self._active)) - len(self._queue)
            if len(jobs) > free:
                self._count(rejected=len(jobs))
                raise QueueFullError(self._retry_after(len(jobs) - free))
            self._queue.extend(jobs)
            self._changed.notify_all()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Gives pictures up: those that wait at once, those in work before their next step. Finished ones stay."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._queue:
                    self._queue.remove(job)
                    self._count(cancelled=1)
                    job.future.set_exception(CancelledError("The picture was cancelled while it waited."))
            self._changed.notify_all()

    def drain(self) -> None:
        """Takes no more requests and hands back those that wait; those in work go on."""
        with self._changed:
            self._draining = True
            self._hand_back()

    def close(self, grace: float = 0.0) -> None:
        """Drains, waits for what is in work, gives up what is still there, and ends the thread.

        Args:
            grace: greatest wait, in seconds.
        """
        self.drain()
        if self._threads is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._active or not self.alive, timeout=grace)
            for run in self._active:
                run.job.cancelled = True
            self._closing = True
            self._changed.notify_all()
        self._threads.shutdown()

    def _work(self) -> None:
        """The engine's thread."""
        try:
            with torch.inference_mode():
                while self._admit():
                    self._round()
                    self._give_back()
        finally:  # also when the device broke: nobody may wait for ever
            for run in list(self._active):
                run.coroutine.stop()
                self._settle(run, HandedBackError("The engine stopped."))
            with self._changed:
                self._draining = True
                self._hand_back()

    def _admit(self) -> bool:
        """Moves requests from the queue into work, and waits while there are none; returns False at the end."""
        new: list[_Run] = []
        with self._changed:
            while not self._closing and not self._queue and not self._active:
                self._rest()
            if self._closing and not self._active:
                return False
            while self._queue and len(self._active) < self.max_active:
                new.append(self._begin(self._queue.popleft()))
                self._active.append(new[-1])
            self._throughput.busy(self._clock())
        for run in new:
            run.coroutine.start()
            self._go_on(run)
        return True

    def _rest(self) -> None:
        """Waits for work; when none came for a while, gives memory back that only work needs."""
        self._throughput.idle()
        self._evaluator.forget()
        if not self._changed.wait(GIVE_BACK_SECONDS):
            give_back()
            self._changed.wait()

    def _give_back(self) -> None:
        """Keeps a busy server small: pictures of all sizes and steps leave holes in the heap that others rarely fit."""
        if self._clock() - self._given_back >= GIVE_BACK_SECONDS:
            give_back()
            self._given_back = self._clock()

    def _begin(self, job: Job) -> _Run:
        assert self._threads is not None

        def run(ask: Callable[[Do], Any]) -> Any:
            work_alone()  # beside the networks, which are the engine's thread's, all is small
            return job.run(SteppedPipeline(self.pipeline, ask))

        return _Run(job, Coroutine(run, self._threads))

    def _round(self) -> None:
        """Answers what every request in work asks of the transformer, and takes each to its next such question."""
        for run in list(self._active):
            if run.job.cancelled:
                run.coroutine.stop()
                self._settle(run)
        runs = list(self._active)
        if not runs:
            return
        with self.pipeline.stage("transformer"):
            answers = self._evaluator.answer([run.coroutine.question for run in runs])
        with self._changed:
            self._count(steps=len(runs))
        for run, answer in zip(runs, answers, strict=True):
            run.coroutine.resume(answer)
            self._go_on(run)

    def _go_on(self, run: _Run) -> None:
        """Answers everything but questions for the transformer."""
        coroutine = run.coroutine
        while isinstance(coroutine.question, Do):
            if run.job.cancelled:
                coroutine.stop()
            else:
                coroutine.resume(attempt(coroutine.question.function))
        if coroutine.finished:
            self._settle(run)

    def _settle(self, run: _Run, instead: Exception | None = None) -> None:
        """Hands over what became of a request."""
        outcome = run.coroutine.outcome()
        with self._changed:
            self._active.remove(run)
            if outcome.error is None:
                self._count(images=1)
                self._throughput.done(run.job.cost, self._clock())
            elif instead is not None:
                outcome = Outcome(error=instead)
                self._count(handed_back=1)
            elif run.job.cancelled:
                outcome = Outcome(error=CancelledError("The picture was cancelled in work."))
                self._count(cancelled=1)
            else:
                self._count(failed=1)
            self._changed.notify_all()
        if outcome.error is not None:
            run.job.future.set_exception(outcome.error)
        else:
            run.job.future.set_result(outcome.value)

    def _hand_back(self) -> None:
        while self._queue:
            self._count(handed_back=1)
            self._queue.popleft().future.set_exception(HandedBackError("The engine stops."))
        self._changed.notify_all()

    def _retry_after(self, places: int) -> int:
        """Returns the seconds after which so many pictures will have left, by the throughput measured so far."""
        ahead = [run.job.cost for run in self._active] + [job.cost for job in self._queue]
        return self._throughput.wait(sum(ahead[:places]))

    def _count(self, **more: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + number for name, number in more.items()}
        )
