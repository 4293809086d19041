"""A stand-in for CUDA graphs on a CPU: what is recorded runs again on its own buffers. No test is here."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sana.pipelines.graphs import CaptureError


class StandInRecording:
    """Runs the function it was made with, on its buffers and into its output, as a graph does."""

    def __init__(self, recorder: "StandInRecorder", function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
        self._recorder, self._function = recorder, function
        self.inputs = inputs
        self.output = function(**inputs).clone()
        self.replays = 0
        self.released = False

    def replay(self) -> None:
        assert not self.released, "a dropped graph was replayed"
        assert self._recorder.inside == 1, "graphs run one at a time"
        self.replays += 1
        self.output.copy_(self._function(**self.inputs))

    def release(self) -> None:
        assert not self.released
        self.released = True
        self._recorder.live -= 1
        self._recorder.pool_is_dead = self._recorder.live == 0


class StandInRecorder:
    """A `Recorder` that keeps what it recorded, and fails like CUDA when a pool is used that lost its last graph.

    Args:
        graph_bytes: what the pool grows by with each recording.
    """

    def __init__(self, graph_bytes: int = 0) -> None:
        self.graph_bytes = graph_bytes
        self.pool_bytes = 0
        self.recordings: list[StandInRecording] = []
        self.retired = 0
        self.live = 0
        self.pool_is_dead = False
        self.inside = 0
        self.fail: str | None = None
        self.room = 1000  # number of graphs for which there is memory
        self._guard = threading.Lock()

    def record(self, function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> StandInRecording:
        assert not self.pool_is_dead, "the pool's last graph is gone and it was not retired"
        if self.live >= self.room:
            raise torch.OutOfMemoryError("no memory")
        if self.fail:
            raise CaptureError(self.fail)
        buffers = {name: torch.empty(value.shape, dtype=value.dtype).copy_(value) for name, value in inputs.items()}
        self.recordings.append(StandInRecording(self, function, buffers))
        self.live += 1
        self.pool_bytes += self.graph_bytes
        return self.recordings[-1]

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._guard:
            self.inside += 1
        try:
            yield
        finally:
            with self._guard:
                self.inside -= 1

    def retire(self) -> None:
        assert self.live == 0
        self.pool_is_dead = False
        self.pool_bytes = 0
        self.retired += 1
