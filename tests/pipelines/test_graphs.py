"""The cache of captured graphs: keys, buffers, what is dropped and when, failures; and the order of CUDA calls."""

import threading
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sana.pipelines.graphs import CaptureError, CudaRecorder, GraphCache, to_host, waits_for_host
from tests.pipelines.recorder import StandInRecorder


def double(x, y):
    return 2 * x + y


def pair(*shape, dtype=torch.float32):
    return {"x": torch.randn(*shape).to(dtype), "y": torch.randn(*shape).to(dtype)}


def test_replays_read_the_buffers_and_results_are_the_callers_own():
    recorder = StandInRecorder()
    cache = GraphCache(2, recorder)
    first, second = pair(2, 3), pair(2, 3)
    one = cache.call("a", double, first)
    wanted = double(**first)
    first["x"].zero_()
    two = cache.call("a", double, second)
    assert torch.equal(one, wanted), "a later call changed an earlier result"
    assert torch.equal(two, double(**second))
    assert len(recorder.recordings) == 1
    assert recorder.recordings[0].replays == 2
    assert recorder.recordings[0].inputs["x"].data_ptr() not in (first["x"].data_ptr(), second["x"].data_ptr())


def test_a_hit_replays_the_function_that_was_captured():
    cache = GraphCache(2, StandInRecorder())
    inputs = pair(2)
    cache.call("a", double, inputs)
    assert torch.equal(cache.call("a", lambda x, y: x * 0, inputs), double(**inputs))


@pytest.mark.parametrize(
    "other",
    [
        ("b", pair(2, 3)),
        ("a", pair(3, 2)),
        ("a", pair(1, 2, 3)),
        ("a", pair(2, 3, dtype=torch.float64)),
        ("a", {"x": torch.ones(2, 3), "y": torch.ones(2, 3), "z": torch.ones(1)}),
    ],
)
def test_key_names_shapes_and_dtypes_tell_graphs_apart(other):
    recorder = StandInRecorder()
    cache = GraphCache(4, recorder)
    cache.call("a", double, pair(2, 3))
    key, inputs = other
    result = cache.call(key, lambda x, y, z=None: 2 * x + y, inputs)
    assert torch.equal(result, double(inputs["x"], inputs["y"]))
    assert len(recorder.recordings) == len(cache) == 2


def test_the_least_recently_used_graph_is_dropped():
    recorder = StandInRecorder()
    cache = GraphCache(2, recorder)
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.call(key, double, pair(2))
    first_a, first_b, c, second_b = recorder.recordings
    assert [one.released for one in (first_a, first_b, c, second_b)] == [False, True, True, False]
    assert len(cache) == 2
    assert recorder.retired == 0


def test_a_pool_that_lost_its_last_graph_is_retired_before_the_next_capture():
    recorder = StandInRecorder()
    cache = GraphCache(1, recorder)
    for key in ("a", "b", "a"):
        cache.call(key, double, pair(2))
    assert [one.released for one in recorder.recordings] == [True, True, False]
    assert recorder.retired == 2


def test_too_many_bytes_drop_every_graph_but_the_needed_one():
    recorder = StandInRecorder(graph_bytes=400)
    cache = GraphCache(8, recorder, max_bytes=1000)
    for key in ("a", "b"):
        cache.call(key, double, pair(2))
    assert len(cache) == 2 and cache.bytes == 800 + 2 * 16
    inputs = pair(2)
    assert torch.equal(cache.call("c", double, inputs), double(**inputs))
    assert len(cache) == 1 and cache.bytes == 400 + 16
    assert [one.released for one in recorder.recordings] == [True, True, True, False]


def test_one_graph_alone_may_exceed_the_limit_and_is_replayed():
    recorder = StandInRecorder(graph_bytes=4000)
    cache = GraphCache(8, recorder, max_bytes=1000)
    for key in ("a", "a", "b", "b"):
        inputs = pair(2)
        assert torch.equal(cache.call(key, double, inputs), double(**inputs))
    assert len(recorder.recordings) == 2, "each is captured once: the first is dropped before the second is captured"
    assert len(cache) == 1


def test_a_failed_capture_leaves_the_other_graphs():
    recorder = StandInRecorder()
    cache = GraphCache(2, recorder)
    cache.call("a", double, pair(2))
    recorder.fail = "this cannot be captured."
    with pytest.raises(CaptureError, match="cannot be captured"):
        cache.call("b", double, pair(2))
    assert torch.isfinite(cache.call("a", double, pair(2))).all()
    recorder.fail = None
    inputs = pair(2)
    assert torch.equal(cache.call("b", double, inputs), double(**inputs))
    assert len(recorder.recordings) == 2


def test_out_of_memory_drops_the_other_graphs_before_it_is_an_error():
    recorder = StandInRecorder()
    cache = GraphCache(4, recorder)
    for key in "ab":
        cache.call(key, double, pair(2))
    recorder.room, inputs = 1, pair(2)
    assert torch.equal(cache.call("c", double, inputs), double(**inputs))
    assert len(cache) == recorder.live == 1
    recorder.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        cache.call("d", double, inputs)
    assert len(cache) == recorder.live == 0


def test_clear_gives_everything_back():
    recorder = StandInRecorder(graph_bytes=7)
    cache = GraphCache(4, recorder)
    for key in "abc":
        cache.call(key, double, pair(2))
    cache.clear()
    cache.clear()
    assert len(cache) == cache.bytes == 0
    assert recorder.retired == 1 and all(one.released for one in recorder.recordings)


def test_capacity_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        GraphCache(0, StandInRecorder())


def test_threads_take_turns():
    recorder = StandInRecorder()
    cache = GraphCache(2, recorder)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(20):
            inputs = {"x": torch.full((8,), float(seed)), "y": torch.full((8,), float(step))}
            if not torch.equal(cache.call("a", double, inputs), double(**inputs)):
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(recorder.recordings) == 1


def test_what_was_captured_in_inference_mode_serves_outside_and_the_other_way_round():
    cache = GraphCache(2, StandInRecorder())
    inputs = pair(2)
    with torch.inference_mode():
        cache.call("a", double, inputs)
    assert torch.equal(cache.call("a", double, inputs), double(**inputs))


def test_to_host_on_a_host():
    one, two = torch.randn(2), torch.arange(3)
    assert all(torch.equal(a, b) for a, b in zip(to_host(one, two), (one, two), strict=True))


# What a CUDA recorder does, on a stand-in for torch.cuda that writes down every call.


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for event")

    def record_event(self):
        return object()


class FakeCuda(SimpleNamespace):
    """The calls of torch.cuda that the recorder makes; `capture` names what fails in a capture."""

    def __init__(self):
        self.log: list[str] = []
        self.fail_end = False
        self.capturing = False
        self.main = FakeStream("main", self.log)
        self.current = self.main
        self.reserved = 100
        self.pools = 0
        self.mode = 0
        self.ended_pools: list[object] = []

    def Stream(self):  # noqa: N802
        return FakeStream("side", self.log)

    def current_stream(self, device=None):
        return self.current

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append("replay"), reset=lambda: self.log.append("reset"))

    def graph_pool_handle(self):
        self.pools += 1
        return ("pool", self.pools)

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
        self.current, self.capturing = stream, True
        try:
            yield
        finally:  # as torch does it: a capture that cannot end leaves its stream current
            self.capturing = False
            if self.fail_end:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
        self.reserved += 50

    def synchronize(self, device=None):
        self.log.append("synchronize")

    def empty_cache(self):
        self.log.append("empty_cache")

    def memory_reserved(self):
        return self.reserved

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    names = [name for name in dir(fake) if name in dir(torch.cuda) and not name.startswith("_")]
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: fake.ended_pools.append(pool))
    return fake


@pytest.fixture
def recorder(cuda):
    made = CudaRecorder(torch.device("cuda", 0))
    made._device = torch.device("cpu", 0)
    return made


def test_trial_runs_come_before_the_capture_on_one_side_stream(cuda, recorder):
    runs = []

    def function(x):
        runs.append((cuda.current.name, cuda.mode, cuda.capturing))
        return x + 1

    recording = recorder.record(function, {"x": torch.ones(2)})
    assert runs == [("side", 0, False), ("side", "warn", False), ("side", 0, True)]
    assert cuda.log == [
        "side waits for main",
        "synchronize",
        "empty_cache",
        "capture on side into ('pool', 1), thread_local",
        "main waits for side",
    ]
    assert recorder.pool_bytes == 50
    assert cuda.current is cuda.main
    assert torch.equal(recording.inputs["x"], torch.ones(2)) and torch.equal(recording.output, torch.full((2,), 2.0))
    recorder.record(function, {"x": torch.ones(3)})
    assert cuda.pools == 1, "graphs share a pool"
    recorder.retire()
    recorder.record(function, {"x": torch.ones(4)})
    assert cuda.pools == 2 and recorder.pool_bytes == 50


def test_turns_are_ordered_by_events(cuda, recorder):
    with recorder.turn():
        assert cuda.log == []
    with recorder.turn():
        assert cuda.log == ["main waits for event"]


def test_a_function_that_waits_for_the_host_is_refused_before_the_capture(cuda, recorder):
    def function(x):
        if cuda.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return x

    with pytest.raises(CaptureError, match=r"waits for the host at .*test_graphs\.py:\d+"):
        recorder.record(function, {"x": torch.ones(2)})
    assert not any("capture" in line for line in cuda.log)
    assert cuda.mode == 0 and cuda.current is cuda.main and cuda.log[-1] == "main waits for side"


def test_a_capture_that_breaks_off_is_ended_and_leaves_its_pool(cuda, recorder):
    cuda.fail_end = True
    with pytest.raises(
        CaptureError, match="failed: CUDA error: operation failed due to a previous error during capture$"
    ):
        recorder.record(lambda x: x, {"x": torch.ones(2)})
    assert cuda.ended_pools == [("pool", 1)]
    assert cuda.current is cuda.main, "the caller's stream is current again"
    cuda.fail_end = False
    recorder.record(lambda x: x, {"x": torch.ones(2)})
    assert cuda.pools == 2


def test_errors_of_the_function_itself_pass(cuda, recorder):
    def function(x):
        if cuda.capturing:
            raise ValueError("of its own")
        return x

    with pytest.raises(ValueError, match="of its own"):
        recorder.record(function, {"x": torch.ones(2)})
    recorder.record(lambda x: x, {"x": torch.ones(2)})
    assert cuda.pools == 2, "the first pool has no graph and can never be used again"


def test_only_waits_of_this_thread_count_and_other_warnings_pass(cuda):
    def elsewhere():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def function():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        warnings.warn("something else", stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert waits_for_host(function, {}) == []
    assert [str(one.message) for one in seen] == ["something else"]
