"""The C library's heaps in a process that serves for months. What pictures need is in `sana/pipelines/memory`."""

import ctypes

M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> bool:
    """Has all threads of this process allocate from one heap. To be called before there are threads.

    glibc gives every thread a heap of its own, up to eight times the number of cores, and a heap keeps at its end
    whatever its greatest moment needed. The engine's threads take turns, so that many heaps only mean that a server
    takes memory for the first thousands of requests; with one it stays as large as after the first hundreds.

    Returns:
        Whether the C library has such a switch: False outside glibc, where nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has no mallopt, Windows no library of that name
        return False
    return bool(mallopt(M_ARENA_MAX, 1))
