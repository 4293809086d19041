"""Freed memory is kept: the same sizes again cost no new pages."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from sana.utils.allocator import keep_freed_memory

def faults(rounds=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(40 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
plain = faults()
assert keep_freed_memory() is True
faults()
print(plain, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is asked, on Linux only")
def test_large_tensors_are_made_of_known_pages():
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    plain, kept = map(int, output.stdout.split())
    assert kept < plain / 10


def test_elsewhere_nothing_is_asked(monkeypatch):
    from sana.utils import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory.__wrapped__() is False
