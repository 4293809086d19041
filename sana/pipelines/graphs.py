"""CUDA graphs of functions of tensors, kept for the inputs seen last. Which functions are captured is not here.

A graph replays kernels at fixed addresses, so each has buffers of its own that inputs are copied into, and its output
is copied out before anything else runs. All graphs of a cache share one memory pool: that is safe in any order of
replays because the inputs live outside the pool, the output is copied at once, and `turn` runs one graph at a time.
"""

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from sana.utils.logging import get_logger

logger = get_logger(__name__)

MIB = 2**20
_SYNC_WARNING = "called a synchronizing CUDA operation"
Function = Callable[..., Tensor]


class CaptureError(RuntimeError):
    """A function could not be captured in a graph; the message says why."""


class Recording(Protocol):
    """One captured function.

    Attributes:
        inputs: the buffers it reads, by argument name.
        output: the buffer it writes.
    """

    inputs: dict[str, Tensor]
    output: Tensor

    def replay(self) -> None:
        """Runs the captured work on what the buffers hold."""

    def release(self) -> None:
        """Waits for running work and gives the graph up."""


class Recorder(Protocol):
    """What captures functions.

    Attributes:
        pool_bytes: memory that the recordings hold beside their inputs; it falls only when `retire` is called.
    """

    pool_bytes: int

    def record(self, function: Function, inputs: Mapping[str, Tensor]) -> Recording:
        """Captures `function(**inputs)` on buffers of its own.

        Raises:
            CaptureError: it cannot be captured.
        """

    def turn(self) -> AbstractContextManager[None]:
        """Orders the work inside after that of the turn before, on whatever streams."""

    def retire(self) -> None:
        """Gives the shared memory back; every recording was released before."""


class GraphCache:
    """Captured graphs by key: the least recently used is dropped when there are too many or they hold too much memory.

    A shared pool returns memory only when its last graph is gone, so too many bytes drop all graphs but the one that is
    needed, which is then captured again in a fresh pool.

    Args:
        capacity: greatest number of graphs.
        recorder: what captures.
        max_bytes: memory that pool and inputs may hold together; None for no limit. One graph alone may exceed it.

    Raises:
        ValueError: capacity is not at least 1.
    """

    def __init__(self, capacity: int, recorder: Recorder, *, max_bytes: int | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"The number of graphs to keep must be at least 1, not {capacity}.")
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._recorder = recorder
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()  # the most recently used is the last
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def bytes(self) -> int:
        """Memory that the graphs hold."""
        inputs = (tensor for one in self._recordings.values() for tensor in one.inputs.values())
        return self._recorder.pool_bytes + sum(tensor.nbytes for tensor in inputs)

    @torch.inference_mode()
    def call(self, key: Hashable, function: Function, inputs: Mapping[str, Tensor], *, label: str = "a loop") -> Tensor:
        """Returns `function(**inputs)`, from a graph that is captured when there is none yet.

        Args:
            key: everything that the function bakes in beside its inputs' names, shapes and dtypes.
            function: from tensors to one tensor; it must not wait for the host.
            inputs: its arguments. Those on the host are copied without waiting; do not change them meanwhile.
            label: what is captured, for the log.

        Returns:
            A tensor of the caller's own.

        Raises:
            CaptureError: the function cannot be captured. The cache stays usable.
        """
        full_key = (key, *((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items())))
        with self._lock, self._recorder.turn():
            recording = self._recordings.pop(full_key, None) or self._record(function, inputs, label)
            self._recordings[full_key] = recording
            for name, value in inputs.items():
                fill(recording.inputs[name], value)
            recording.replay()
            return recording.output.clone()

    def clear(self) -> None:
        """Drops all graphs and gives their memory back."""
        with self._lock:
            while self._recordings:
                self._drop_oldest()

    def _record(self, function: Function, inputs: Mapping[str, Tensor], label: str) -> Recording:
        while len(self._recordings) >= self.capacity:
            self._drop_oldest()
        if self._too_large():
            self.clear()
        logger.info("Capturing %s: only the first call of its kind does.", label)
        start = time.perf_counter()
        try:
            recording = self._recorder.record(function, inputs)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
            logger.info("Not enough memory is left; the %d captured graphs are dropped.", len(self))
            self.clear()
            recording = self._recorder.record(function, inputs)
        if self._recordings and self._too_large():
            logger.info("The graphs hold %.0f MiB, more than their limit; they are dropped.", self.bytes / MIB)
            recording.release()
            self.clear()
            recording = self._recorder.record(function, inputs)
        held = (self.bytes + sum(tensor.nbytes for tensor in recording.inputs.values())) / MIB
        seconds = time.perf_counter() - start
        logger.info("Captured %s in %.1f s; %d graphs hold %.0f MiB.", label, seconds, len(self) + 1, held)
        return recording

    def _too_large(self) -> bool:
        return self.max_bytes is not None and self.bytes > self.max_bytes

    def _drop_oldest(self) -> None:
        _, oldest = self._recordings.popitem(last=False)
        oldest.release()
        if not self._recordings:  # a pool that has lost its last graph can never be captured into again
            self._recorder.retire()


def fill(buffer: Tensor, value: Tensor) -> None:
    """Copies `value` into `buffer`; from the host through pinned memory, so that the host does not wait."""
    if value.device.type == "cpu" and buffer.device.type == "cuda" and not value.is_pinned():
        value = value.pin_memory()  # its memory is not reused before the copy is done
    buffer.copy_(value, non_blocking=True)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns copies on the host of tensors of one device, in pinned memory, after waiting once for all of them."""
    if all(tensor.device.type != "cuda" for tensor in tensors):
        return tuple(tensor.cpu() for tensor in tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return tuple(copies)


class CudaRecording:
    """A `torch.cuda.CUDAGraph` with its buffers; see `Recording`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: dict[str, Tensor], output: Tensor) -> None:
        self._graph = graph
        self.inputs = inputs
        self.output = output

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        torch.cuda.synchronize(self.output.device)
        self._graph.reset()
        self.inputs, self.output = {}, torch.empty(0)  # the pool's memory is free only without its last tensor


class CudaRecorder:
    """Captures with `torch.cuda.graph`; see `Recorder`.

    Before the capture the function runs once on a side stream, which compiles kernels and fills caches outside the
    pool, and once more while torch reports every wait for the host. A function that waits is refused there: a capture
    that breaks off would leave torch 2.11's allocator in the middle of it.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._last: torch.cuda.Event | None = None
        self.pool_bytes = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last = stream.record_event()

    def retire(self) -> None:
        self._pool = None
        self.pool_bytes = 0
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def record(self, function: Function, inputs: Mapping[str, Tensor]) -> CudaRecording:
        with torch.cuda.device(self._device):
            buffers = {
                name: torch.empty(one.shape, dtype=one.dtype, device=self._device) for name, one in inputs.items()
            }
            for name, value in inputs.items():
                fill(buffers[name], value)
            caller = torch.cuda.current_stream()
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._stream):  # gives the caller's stream back even where the capture does not
                    function(**buffers)
                    waits = waits_for_host(function, buffers)
                    if waits:
                        raise CaptureError(f"This cannot run as a graph, because it waits for the host at {waits[0]}.")
                    return self._capture(function, buffers)
            finally:
                caller.wait_stream(self._stream)

    def _capture(self, function: Function, buffers: dict[str, Tensor]) -> CudaRecording:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the trial runs' memory, so that what is reserved from here on is the graph's
        before = torch.cuda.memory_reserved()
        graph, self._pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = function(**buffers)
        except BaseException as error:
            self._break_off()
            if not isinstance(error, RuntimeError):  # the function's own
                raise
            reason = str(error).strip().partition("\n")[0]
            raise CaptureError(f"The capture of a graph failed: {reason}") from error
        self.pool_bytes += max(0, torch.cuda.memory_reserved() - before)
        return CudaRecording(graph, buffers, output)

    def _break_off(self) -> None:
        """Ends a failed capture for the allocator, and goes on in another pool."""
        pool, self._pool = self._pool, None
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
        except RuntimeError as error:  # it had ended already
            logger.debug("After a failed capture: %s", error)


def waits_for_host(function: Function, inputs: Mapping[str, Tensor]) -> list[str]:
    """Runs `function(**inputs)` and returns where it waited for the host: "file:line", in order.

    Torch's own report is used, which covers the whole process; warnings of other threads are passed on.
    """
    places: list[str] = []
    thread, mode = threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def collect(
            message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
        ) -> None:
            if _SYNC_WARNING not in str(message):
                show(message, category, filename, lineno, file, line)
            elif threading.get_ident() == thread:
                places.append(f"{filename}:{lineno}")

        warnings.showwarning = collect
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return places
