"""What kernels hold while they run, against what PyTorch's allocator reports of them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.ops.linear.cpu import linear_cpu
from sana.ops.packing import set_pack_budget
from sana.pipelines.memory.kernels import FusedAttention, cpu_kernels
from sana.pipelines.memory.tracker import MemoryTracker
from tools.measure_memory import measured_peak


def predicted(run, *given: torch.Tensor) -> int:
    with torch.no_grad(), MemoryTracker(extra=cpu_kernels) as tracker:
        tracker.ignore(given)
        run()
    return tracker.peak


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_with_wide_weights(layout, weight_layout) -> None:
    """9 MiB of weights, and as much again for each of their copies."""
    image = torch.zeros(1, 512, 32, 32).contiguous(memory_format=layout)
    weight = torch.zeros(512, 512, 3, 3).contiguous(memory_format=weight_layout)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return F.conv2d(image, weight, padding=1)

    measured = measured_peak(run, "cpu")
    assert measured > weight.nbytes
    assert predicted(run, image, weight) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("budget", [0, None])
def test_a_product_holds_nothing_besides_its_result(budget) -> None:
    tokens, weight = torch.zeros(1024, 2048), torch.zeros(2048, 2048)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return linear_cpu(tokens, weight)

    set_pack_budget(budget)
    try:
        run()  # packs
        measured = measured_peak(run, "cpu")
    finally:
        set_pack_budget(None)
    assert predicted(lambda: F.linear(tokens, weight), tokens, weight) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_attention_on_a_gpu_never_holds_all_scores(dtype) -> None:
    with FakeTensorMode(), FusedAttention(), torch.no_grad(), MemoryTracker() as tracker:
        query = torch.empty(2, 16, 4096, 72, device="cuda", dtype=dtype)
        key = torch.empty(2, 16, 300, 72, device="cuda", dtype=dtype)
        mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
        before = tracker.live
        out = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    assert out.shape == query.shape
    assert out.device.type == "cuda"
    assert query.nbytes <= tracker.peak - before < 1.1 * query.nbytes


def test_grouped_heads_give_the_shape_of_the_queries() -> None:
    with FakeTensorMode(), FusedAttention():
        query = torch.empty(1, 8, 10, 64, device="cuda")
        key = torch.empty(1, 2, 10, 64, device="cuda")
        assert F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).shape == query.shape
