"""The heap of a server: the C library's switches do what they say, each in a process of its own."""

import subprocess
import sys

import pytest

from sana.serving import memory

COMMON = """
import ctypes, threading
from sana.serving.memory import give_back, share_one_heap

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

def heaps():  # glibc puts every heap but the first at a multiple of 64 MiB
    starts = [int(line.split("-")[0], 16) for line in open("/proc/self/maps")]
    return sum(start % 2**26 == 0 for start in starts)

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
"""


def run(code: str) -> list[str]:
    if not sys.platform.startswith("linux") or memory.c_function("malloc_trim") is None:
        pytest.skip("needs glibc")
    done = subprocess.run([sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_one_heap(shared):
    code = f"if {shared}: assert share_one_heap()\n"
    code += "before = heaps()\nbarrier = threading.Barrier(5)\n"
    code += "def work():\n    barrier.wait()\n    libc.malloc(1000)\n    barrier.wait()\n"
    code += "threads = [threading.Thread(target=work) for _ in range(4)]\nfor one in threads: one.start()\n"
    code += "barrier.wait(); barrier.wait(); print(heaps() - before)"
    (more,) = run(code)
    assert (int(more) == 0) is shared


def test_pages_between_kept_ones_go_back():
    code = "pieces = [libc.malloc(2**16) for _ in range(1000)]\nfor one in pieces: ctypes.memset(one, 1, 2**16)\n"
    code += "for index, one in enumerate(pieces):\n    if index % 10: libc.free(one)\n"
    code += "before = resident(); print(give_back()); print(before - resident())"
    said, freed = run(code)
    assert said == "True" and float(freed) > 40  # MiB, of 56 that were freed


def test_old_circles_are_found_soon_once_the_rest_is_kept():
    code = "import gc, weakref\nfrom sana.serving.memory import keep_what_is_loaded\n"
    code += "kept = [[] for _ in range(2_000_000)]\nclass Circle: pass\n"
    code += "def until_found():\n    one = Circle(); one.own = one; found = weakref.ref(one)\n"
    code += "    gc.collect(1)\n"  # it is old now
    code += "    del one\n    others = []\n    while found() is not None and len(others) < 900_000: others.append([])\n"
    code += "    return len(others)\n"
    code += "gc.collect(); print(until_found()); keep_what_is_loaded(); print(until_found())"
    before, after = map(int, run(code))
    assert after < before / 3


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(memory, "c_function", lambda name: None)
    assert memory.share_one_heap() is False and memory.give_back() is False
