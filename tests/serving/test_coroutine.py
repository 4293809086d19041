"""Coroutines on threads: order, answers, errors, stopping, and that only one thread ever runs."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.serving.coroutine import Coroutine, Outcome, Stopped


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
