"""The workers of OpenMP: how many threads the system counts, in processes of their own with two to a parallel loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana.serving.memory import c_function

ROOT = Path(__file__).parents[2]
COMMON = """
import os, threading, time
import torch
from sana.serving.workers import release_workers, work_alone

def loop():
    torch.rand(2**22).add_(1)

def workers():  # threads of the system that are not Python's
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def expected(count, since):  # a thread that was told to end is there for a moment
    end = time.monotonic() + 20
    while workers() - since != count and time.monotonic() < end:
        time.sleep(0.01)
    return workers() - since

def elsewhere(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

resting = workers()
"""


def run(code: str) -> list[str]:
    if not sys.platform.startswith("linux") or c_function("omp_pause_resource_all") is None:
        pytest.skip("needs GNU's OpenMP")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_workers_go_when_they_are_released_and_come_back():
    code = "loop(); print(workers() - resting)\nassert release_workers()\nprint(expected(0, resting))\n"
    code += "loop(); print(workers() - resting, torch.get_num_threads())"
    assert run(code) == ["1", "0", "1", "2"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_thread_that_works_alone_has_none_and_others_keep_theirs(alone):
    code = f"counted = []\ndef work():\n    if {alone}: assert work_alone()\n    loop(); counted.append(workers())\n"
    code += "elsewhere(work); print(counted[0] - resting)\nloop(); print(workers() - resting, torch.get_num_threads())"
    assert run(code) == ["0" if alone else "1", "1", "2"]


def test_only_the_engines_thread_has_workers():
    code = """
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving.engine import Engine

pipeline = SanaPipeline.from_pretrained("asset/models/sana_tiny", device="cpu")
call = {"num_inference_steps": 1, "seed": 3, "height": 512, "width": 512, "use_resolution_binning": False}
offline = pipeline("a red heart", output_type="np", progress_bar=False, **call)
release_workers()
time.sleep(1)
before = workers()  # those of libraries
loop()
with Engine(pipeline) as engine:
    jobs = engine.submit([Request("a red heart", output_type="np", **call) for _ in range(3)])
    pictures = [job.future.result() for job in jobs]
    print(expected(1, before), all((one == offline).all() for one in pictures))
"""
    assert run(code) == ["1", "True"]
