"""Coroutines on threads: order, answers, errors, stopping, and that only one thread ever runs."""

import gc
import random
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.serving.coroutine import Coroutine, Outcome, Stopped, forget_frames


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def adds(ask):
    return ask("a") + ask("b")


def test_questions_and_answers_alternate(threads):
    one = Coroutine(adds, threads)
    one.start()
    assert one.question == "a" and not one.finished
    one.resume(Outcome(1))
    assert one.question == "b"
    one.resume(Outcome(2))
    assert one.finished and one.question is None
    assert one.outcome() == Outcome(3)


def test_an_error_is_raised_where_it_was_asked(threads):
    def tries(ask):
        try:
            ask("first")
        except KeyError as error:
            return ask(f"again after {error}")

    one = Coroutine(tries, threads)
    one.start()
    one.resume(Outcome(error=KeyError("x")))
    assert one.question == "again after 'x'"
    one.resume(Outcome("done"))
    assert one.outcome().unwrap() == "done"


def test_what_the_function_raises_is_its_outcome(threads):
    def fails(ask):
        raise ValueError(ask("why"))

    one = Coroutine(fails, threads)
    one.start()
    one.resume(Outcome("because"))
    with pytest.raises(ValueError, match="because"):
        one.outcome().unwrap()


def test_a_function_without_questions_is_finished_at_once(threads):
    one = Coroutine(lambda ask: 7, threads)
    one.start()
    assert one.finished and one.outcome().unwrap() == 7


def test_stopping_runs_what_cleans_up_and_refuses_its_questions(threads):
    cleaned = []

    def careful(ask):
        try:
            ask("work")
        except Exception:  # a library that keeps everything; Stopped is none of its errors
            cleaned.append("swallowed")
            raise
        finally:
            try:
                ask("may I clean up?")
            finally:
                cleaned.append("cleaned")

    one = Coroutine(careful, threads)
    one.start()
    one.stop()
    assert one.finished and cleaned == ["cleaned"]
    assert isinstance(one.outcome().error, Stopped)


def test_one_that_never_started_was_stopped(threads):
    one = Coroutine(adds, threads)
    one.stop()
    assert isinstance(one.outcome().error, Stopped)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_never_two_at_once(lengths, seed):
    rng, running, most = random.Random(seed), [], []

    def walks(length):
        def function(ask):
            total = 0
            for step in range(length):
                running.append(threading.get_ident())
                most.append(max(len(running) for _ in range(500)))
                running.pop()
                total += ask(step)
            return total

        return function

    with ThreadPoolExecutor(len(lengths)) as pool:
        all_ = [Coroutine(walks(length), pool) for length in lengths]
        for one in all_:
            one.start()
        while any(not one.finished for one in all_):
            waiting = rng.choice([one for one in all_ if not one.finished])
            waiting.resume(Outcome(waiting.question * 10))
    assert [one.outcome() for one in all_] == [Outcome(sum(10 * step for step in range(n))) for n in lengths]
    assert set(most) <= {1}


class Kept:
    """Stands for a tensor that a function has in a variable."""


@pytest.mark.parametrize("ending", ["returned", "raised", "answered with an error", "stopped"])
def test_what_a_function_had_is_freed_without_the_garbage_collector(threads, ending):
    alive = []

    def function(ask):
        kept = Kept()
        alive.append(weakref.ref(kept))
        ask(kept.__class__)
        if ending == "raised":
            raise ValueError("no")
        return "done"

    gc.collect()
    gc.disable()
    try:
        one = Coroutine(function, threads)
        alive.append(weakref.ref(one))
        one.start()
        if ending == "stopped":
            one.stop()
        else:
            one.resume(Outcome(error=KeyError("x")) if ending == "answered with an error" else Outcome(1))
        outcome = one.outcome()
        assert (outcome.error is None) == (ending == "returned")
        del one
        threads.submit(int).result()  # the thread has let go of what it did before
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_an_error_has_notes_in_the_place_of_its_tracebacks():
    def inner():
        kept = Kept()
        references.append(weakref.ref(kept))
        raise KeyError("inner")

    def outer():
        try:
            inner()
        except KeyError as error:
            raise ValueError("outer") from error

    def caught():
        try:
            outer()
        except ValueError as error:
            return error

    references = []
    error = caught()
    assert references[0]() is not None
    forget_frames(error)
    assert references[0]() is None and error.__traceback__ is error.__cause__.__traceback__ is None
    text = "".join(traceback.format_exception(error))
    assert "in outer\n" in text and "in inner\n" in text and 'raise KeyError("inner")' in text
