"""Which threads of OpenMP there are besides a server's own. How many a computation uses stays PyTorch's affair.

OpenMP keeps worker threads for every thread that ever ran a parallel loop. As soon as there are more of all these
together than cores, GNU's OpenMP lets them sleep between two loops instead of waiting for the next, and a small
model, which has thousands of small loops, takes twice the time. So only the engine's thread is to have workers.
"""

import torch

from sana.serving.memory import c_function

SOFT = 1  # omp_pause_soft: what was set stays, and workers come back with the next parallel loop


def release_workers() -> bool:
    """Ends the workers of the calling thread; they come back when it runs a parallel loop again.

    Returns:
        Whether OpenMP can do so: False where PyTorch has another or none.
    """
    pause = c_function("omp_pause_resource_all")
    return pause is not None and pause(SOFT) == 0


def work_alone() -> bool:
    """Lets the calling thread run its parallel loops by itself from now on. No other thread is concerned.

    Returns:
        Whether OpenMP can do so: False where PyTorch has another or none.
    """
    limit = c_function("omp_set_num_threads")
    if limit is None:
        return False
    torch.get_num_threads()  # PyTorch says how many when a thread first asks, and so never again
    limit(1)
    return True
