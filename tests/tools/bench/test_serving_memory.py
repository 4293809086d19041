"""The verdict on memory: made-up servers that leak, step, or stay; and what a real process says of itself."""

import itertools
import math
import os
import random
import subprocess
import sys

import pytest

from tests.tools.bench.serving_results import HELD
from tools.bench.serving_memory import BLOCKS, CEILING_MIB, T_99, WARM_UP, Watched, blocks, drift, judge

COUNT = 10_000


def samples(memory):
    """A sample every 50 requests of a process whose memory is a function of their number."""
    return [(done, memory(done)) for done in range(0, COUNT + 1, 50)]


def after_warm_up(done):
    return max(0.0, done - WARM_UP * COUNT)


def test_blocks_are_means_after_the_warm_up():
    found = blocks(samples(lambda done: 0.0 if done <= 3000 else done), COUNT)
    assert len(found) == BLOCKS and found[0] == pytest.approx(3175 + 0.5, abs=25) and found[-1] > 9800
    assert [after - before for before, after in itertools.pairwise(found)] == pytest.approx([350] * 19, abs=26)


@pytest.mark.parametrize(
    "memory",
    [
        lambda done: 500.0,
        lambda done: 500.0 + min(done, 3000) / 100,  # grows in the warm-up only
        lambda done: 500.0 + (done > 6000) * 2.0,  # takes a lot of pages once
        lambda done: 500.0 + (done > 4000) * 1.0 + (done > 8000) * 1.0 - (done > 9000) * 0.5,
        lambda done: 500.0 + random.Random(done).random(),  # noise
        lambda done: 500.0 + done % 1100 / 40,  # rises and is given back
    ],
)
def test_what_is_flat(memory):
    assert judge(samples(memory), COUNT, [HELD, HELD])["flat"] is True


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (lambda done: 500.0 + after_warm_up(done) / 5000, "drifts"),  # 200 bytes a request
        (lambda done: 500.0 + after_warm_up(done) / 2000 + random.Random(done).random() / 10, "drifts"),
        (lambda done: 500.0 + (done > 6000) * (CEILING_MIB + 10), "grew by"),
    ],
)
def test_what_is_not(memory, reason):
    verdict = judge(samples(memory), COUNT, [HELD, HELD])
    assert verdict["flat"] is False and reason in verdict["reasons"][0]


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_may_not_grow(name):
    more = HELD | {name: HELD[name] + 10**7}
    verdict = judge(samples(lambda done: 500.0), COUNT, [HELD, more])
    assert verdict["flat"] is False and name in verdict["reasons"][0]
    assert judge(samples(lambda done: 500.0), COUNT, [more, HELD])["flat"] is True


def test_few_requests_get_no_verdict():
    few = [(done, 500.0 + done) for done in range(101)]
    assert judge(few, 100, [HELD, HELD])["flat"] is None


def test_numbers_of_a_drift():
    found = drift([1.0, 2.0, 3.5, 4.0], 100)
    assert found["halves_mib"] == pytest.approx(2.25) and found["per_1000_mib"] == pytest.approx(10.0)
    assert found["per_1000_error_mib"] == pytest.approx(10.0 * 0.5 / 3**0.5)
    assert found["t"] == pytest.approx(1.0 / (0.5 / 3**0.5))
    assert drift([1.0, 1.0, 1.0], 1)["t"] == 0.0 and drift([1.0, 2.0, 3.0], 1)["t"] == math.inf


def test_the_bound_is_students():
    freedom = BLOCKS - 2  # of as many increments less one
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    width = T_99 / 100_000
    middles = (width * (index + 0.5) for index in range(100_000))
    below = 0.5 + sum(scale * width * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in middles)
    assert below == pytest.approx(0.99, abs=1e-4)


def test_a_process_that_takes_memory_and_files_says_so():
    code = (
        "import sys, time\n"
        "from tools.bench.watched_server import holdings\n"
        "import json\n"
        "kept = []\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps(holdings()), flush=True)\n"
        "    kept.append((bytearray(b'x') * 2**25, open('/dev/null'), [[] for _ in range(50_000)]))\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "."}, **pipes) as process:
        watched = Watched(process)
        first, memory = watched.holdings(), watched.memory_mib()
        second = watched.holdings()
        while watched.memory_mib() < memory + 30:  # the lists of the second question are made after its answer
            assert process.poll() is None
        third = watched.holdings()
        process.stdin.close()
    assert second["objects"] - first["objects"] > 40_000 and third["blocks"] - second["blocks"] > 40_000
    assert third["files"] > first["files"] and first["threads"] >= 1 and first["tasks"] == 0
    assert third["native_bytes"] - first["native_bytes"] > 2**25
    assert watched.process.returncode == 0
