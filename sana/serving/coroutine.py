"""Functions that stop in their middle to ask for something, on threads of which only one ever runs. No model is here.

A sampler is an ordinary loop that calls a velocity function. To stop many such loops between their steps, each runs in
a thread of its own, which sleeps except while its owner waits for its next question. So at every moment one thread
runs, as if all were one, and nothing needs a lock.
"""

import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any


class Stopped(BaseException):
    """Raised inside a coroutine whose owner gave it up. No `Exception`, so that no library takes it for its own."""


@dataclass(frozen=True)
class Outcome:
    """What an answer is: a value, or an error to raise where it was asked for."""

    value: Any = None
    error: BaseException | None = None

    def unwrap(self) -> Any:
        """Returns the value.

        Raises:
            BaseException: the error, whichever it is.
        """
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            del self  # the error's traceback holds this frame, and so would keep itself and all that the caller had


class Coroutine:
    """A function in a thread that runs only inside `start`, `resume` and `stop`.

    Args:
        function: takes `ask`, which hands a question to the owner and returns the answer (or raises its error).
        threads: must have a thread to spare for every coroutine that is not finished.

    Attributes:
        question: what the function waits for; None when it is finished.
    """

    def __init__(self, function: Callable[[Callable[[Any], Any]], Any], threads: Executor) -> None:
        self.question: Any = None
        self._function = function
        self._threads = threads
        self._answers: SimpleQueue[Outcome] = SimpleQueue()
        self._questions: SimpleQueue[Any] = SimpleQueue()
        self._result: Future[Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether the function has returned or raised."""
        return self._result is not None and self._result.done() and self.question is None

    def start(self) -> None:
        """Runs the function up to its first question."""
        assert self._result is None, "a coroutine starts once"
        self._result = self._threads.submit(self._function, self._ask)
        questions = self._questions  # a callback that knew this object would keep it, and its outcome, in a circle
        self._result.add_done_callback(lambda _: questions.put(None))
        self.question = questions.get()

    def resume(self, answer: Outcome) -> None:
        """Runs the function from its question to the next one."""
        assert self.question is not None, "only a waiting coroutine can be resumed"
        self._answers.put(answer)
        self.question = self._questions.get()

    def stop(self) -> None:
        """Ends the function where it waits; what it wants while it cleans up, it does not get either."""
        while self.question is not None:
            self.resume(Outcome(error=Stopped()))

    def outcome(self) -> Outcome:
        """Returns what the function returned or raised; `Stopped` if it was never started. It must not be waiting.

        An error has a note in the place of its traceback.
        """
        if self._result is None:
            return Outcome(error=Stopped())
        assert self.finished, "a coroutine has an outcome when it is finished"
        error = self._result.exception()
        if error is None:
            return Outcome(self._result.result())
        forget_frames(error)
        return Outcome(error=error)

    def _ask(self, question: Any) -> Any:
        assert question is not None, "None means that the function is finished"
        self._questions.put(question)
        return self._answers.get().unwrap()


def forget_frames(error: BaseException) -> None:
    """Turns the traceback of an error, and of those that led to it, into a note, which is printed in its place.

    Frames hold tensors, and something that holds the error itself: a circle, which waits for the garbage collector, and
    that looks at old objects rarely in a process that has as many as one with torch.
    """
    current: BaseException | None = error
    while current is not None and current.__traceback__ is not None:
        if not isinstance(current, Stopped):
            current.add_note("Where it was raised:\n" + "".join(traceback.format_tb(current.__traceback__)).rstrip())
        current.__traceback__ = None
        current = current.__cause__ or current.__context__
