"""What the C library does with memory that tensors give back. Tensors on other devices have allocators of their own."""

import ctypes
import functools
import sys

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**30


@functools.cache
def keep_freed_memory() -> bool:
    """Asks glibc to keep freed memory for the next tensors, for the rest of the process.

    By default a freed tensor of some MiB goes back to the system, and its successor, as large, is made of fresh pages
    that the kernel has to clear: in a network on a CPU, where the same sizes come again and again, that takes a tenth
    of the time and more. The process then keeps the memory of its greatest moment.

    Returns:
        Whether the C library could be asked; False on other systems, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, LARGE)) and bool(mallopt(M_MMAP_THRESHOLD, LARGE))
