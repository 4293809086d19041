"""Captured graphs on a GPU: equal to eager runs, bounded in memory, usable after failures."""

import pytest
import torch

from sana.pipelines import graphs
from sana.pipelines.graphs import CaptureError, CudaRecorder, GraphCache, to_host


@pytest.fixture
def gpu_cache():
    cache = GraphCache(3, CudaRecorder(torch.device("cuda")), max_bytes=2**30)
    yield cache
    cache.clear()


def network(x, y):
    for _ in range(4):
        x = torch.nn.functional.silu(x @ y) / 8 + x
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_eager_on_a_gpu_in_any_order(gpu_cache, dtype):
    sizes = [64, 128, 96]
    weights = {size: torch.randn(size, size, device="cuda", dtype=dtype) / size**0.5 for size in sizes}
    for size in (*sizes, *reversed(sizes), *sizes):
        x = torch.randn(7, size, device="cuda", dtype=dtype)
        result = gpu_cache.call("a", network, {"x": x, "y": weights[size]})
        assert torch.equal(result, network(x, weights[size])), f"size {size}"
    assert len(gpu_cache) == 3


@pytest.mark.gpu
def test_inputs_may_lie_on_the_host(gpu_cache):
    x, y = torch.randn(3, 32), torch.randn(32, 32)
    on_gpu = gpu_cache.call("a", network, {"x": x.cuda(), "y": y.cuda()})
    assert torch.equal(gpu_cache.call("a", network, {"x": x, "y": y}), on_gpu)
    assert torch.equal(gpu_cache.call("a", network, {"x": x.pin_memory(), "y": y}), on_gpu)


@pytest.mark.gpu
def test_a_replay_never_waits_for_the_host(gpu_cache):
    inputs = {"x": torch.randn(3, 32, device="cuda"), "y": torch.randn(32, 32, device="cuda")}
    wanted = gpu_cache.call("a", network, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = gpu_cache.call("a", network, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result, wanted)


@pytest.mark.gpu
def test_memory_stays_bounded_and_comes_back(gpu_cache):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    gpu_cache.max_bytes = 64 * 2**20
    held = []
    for size in range(256, 256 + 16 * 24, 16):
        inputs = {"x": torch.randn(4096, size, device="cuda"), "y": torch.randn(size, size, device="cuda")}
        assert torch.equal(gpu_cache.call("a", network, inputs), network(**inputs))
        held.append(gpu_cache.bytes)
        assert len(gpu_cache) <= 3
    del inputs
    one_graph = 6 * 4096 * size * 4 + 2**25  # the greatest loop's tensors, and what cuBLAS and rounding take
    assert max(held) <= max(gpu_cache.max_bytes, one_graph)
    gpu_cache.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26


@pytest.mark.gpu
def test_a_loop_that_waits_is_refused_on_a_gpu_and_the_cache_stays_usable(gpu_cache):
    inputs = {"x": torch.randn(3, 32, device="cuda"), "y": torch.randn(32, 32, device="cuda")}
    with pytest.raises(CaptureError, match=r"waits for the host at .*test_graphs\.py"):
        gpu_cache.call("waits", lambda x, y: x * float(y.sum()), inputs)
    assert torch.equal(gpu_cache.call("a", network, inputs), network(**inputs))


@pytest.mark.gpu
def test_a_capture_that_breaks_off_on_a_gpu_leaves_the_cache_usable(gpu_cache, monkeypatch):
    monkeypatch.setattr(graphs, "waits_for_host", lambda function, inputs: [])
    inputs = {"x": torch.randn(3, 32, device="cuda"), "y": torch.randn(32, 32, device="cuda")}
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match="failed"):
        gpu_cache.call("waits", lambda x, y: x * float(y.sum()), inputs)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(gpu_cache.call("a", network, inputs), network(**inputs))
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_calls_on_two_streams_do_not_mix(gpu_cache):
    y = torch.randn(256, 256, device="cuda") / 16
    xs = [torch.randn(512, 256, device="cuda") for _ in range(8)]
    wanted = [network(x, y) for x in xs]
    gpu_cache.call("a", network, {"x": xs[0], "y": y})
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for index, x in enumerate(xs):
        with torch.cuda.stream(streams[index % 2]):
            results.append(gpu_cache.call("a", network, {"x": x, "y": y}))
    torch.cuda.synchronize()
    assert all(torch.equal(result, one) for result, one in zip(results, wanted, strict=True))


@pytest.mark.gpu
def test_to_host_from_a_gpu():
    one, two = torch.randn(2, 3, 4, device="cuda"), torch.arange(5, device="cuda")
    copies = to_host(one.permute(2, 0, 1), two)
    assert torch.equal(copies[0], one.cpu().permute(2, 0, 1)) and torch.equal(copies[1], two.cpu())
    assert all(copy.is_pinned() for copy in copies)
