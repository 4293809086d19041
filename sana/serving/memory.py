"""The heap and the garbage collector of a process that serves for months. What pictures need is elsewhere."""

import ctypes
import gc
from typing import Any

M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> bool:
    """Has all threads of this process allocate from one heap. To be called before there are threads.

    glibc gives every thread a heap of its own, up to eight times the number of cores, and a heap keeps at its end
    whatever its greatest moment needed. The engine's threads take turns, so that many heaps only mean that a server
    takes memory for the first thousands of requests; with one it stays as large as after the first hundreds.

    Returns:
        Whether the C library has such a switch: False outside glibc, where nothing is done.
    """
    mallopt = c_function("mallopt")
    return mallopt is not None and bool(mallopt(M_ARENA_MAX, 1))


def give_back() -> bool:
    """Gives the system the pages that nothing needs now; takes milliseconds, and they come back when they are needed.

    Returns:
        Whether the C library can: False outside glibc, where nothing is done.
    """
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)
    return trim is not None


def keep_what_is_loaded() -> None:
    """Takes what there is now out of the garbage collector's sight. To be called once, when everything is loaded.

    The collector looks at old objects when a quarter more of them has come. Of the hundred thousands that libraries
    make that is long, so that circles which requests leave would wait for thousands of requests, and every look would
    go through all of them.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # counts anew what is old: next to nothing


def c_function(name: str) -> Any:
    """Returns a function of the C library; None where it has none of that name: musl, macOS, Windows."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
