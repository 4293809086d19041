"""How fast a device can be: data sheets for GPUs, two small probes for a CPU. What is timed is in the parts' files."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from sana import ops
from tools.bench.clocks import CpuStopwatch

# Memory bandwidth in bytes/s and dense floating-point operations/s of the data sheets, by a part of the device's name.
# "fp32" is what torch does by default: without TF32. The first name that fits counts.
PEAKS: dict[str, dict[str, float]] = {
    "H200": {"bandwidth": 4.8e12, "bf16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bandwidth": 2.0e12, "bf16": 756e12, "fp32": 51e12},
    "H100 NVL": {"bandwidth": 3.9e12, "bf16": 835e12, "fp32": 60e12},
    "H100": {"bandwidth": 3.35e12, "bf16": 989e12, "fp32": 67e12},
    "A100-PCIE-40GB": {"bandwidth": 1.555e12, "bf16": 312e12, "fp32": 19.5e12},
    "A100-SXM4-40GB": {"bandwidth": 1.555e12, "bf16": 312e12, "fp32": 19.5e12},
    "A100 80GB PCIe": {"bandwidth": 1.935e12, "bf16": 312e12, "fp32": 19.5e12},
    "A100": {"bandwidth": 2.039e12, "bf16": 312e12, "fp32": 19.5e12},
    "B200": {"bandwidth": 8.0e12, "bf16": 2250e12, "fp32": 75e12},
}
STREAM_BYTES = 256 * 2**20
GEMM_SIZE = 1536


def of_device(device: str, name: str, *, small: bool = False) -> dict[str, Any]:
    """The limits of a device, and where they come from.

    Args:
        device: "cpu" or "cuda".
        name: of the GPU.
        small: shorter probes, for a quick look.

    Returns:
        "bandwidth" in bytes/s, "fp32" and "bf16" in operations/s, and "source"; a GPU without an entry: no numbers.
    """
    if device == "cpu":
        return probe_cpu(STREAM_BYTES // 8 if small else STREAM_BYTES, GEMM_SIZE // 3 if small else GEMM_SIZE)
    known = next((peaks for part, peaks in PEAKS.items() if part.lower() in name.lower()), None)
    return {**known, "source": "data sheet"} if known else {"source": f"no data sheet for {name} in roofline.py"}


def probe_cpu(stream_bytes: int, size: int, rounds: int = 5) -> dict[str, Any]:
    """Measures what all threads reach together: a copy (read + write), and the best of three matrix products.

    Args:
        stream_bytes: copied at once; far more than the caches hold.
        size: rows, columns and depth of the product.
        rounds: the best counts.
    """
    watch = CpuStopwatch()
    source = torch.ones(stream_bytes // 4)
    target = torch.empty_like(source)
    seconds = min(watch(lambda: target.copy_(source)).wall for _ in range(rounds))
    found: dict[str, Any] = {"bandwidth": 2 * stream_bytes / seconds, "source": "copy and matrix product, this run"}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        # MKL, which is slow on AMD's processors; oneDNN, which a 1x1 convolution always takes; and packed weights.
        image, kernel = left[None].mT[..., None].contiguous(memory_format=torch.channels_last), right[..., None, None]
        products = (
            lambda a=left, b=right: a @ b,
            lambda a=image, b=kernel: F.conv2d(a, b),
            lambda a=left, b=right: ops.linear(a, b),
        )
        with torch.inference_mode():
            best = min(watch(product).wall for product in products for _ in range(rounds + 1))
        found[label] = 2 * size**3 / best
    return found


def ideal_seconds(roofline: dict[str, Any], bytes_: float, flops: float, dtype: str) -> float:
    """The least time: the slower of moving the bytes and doing the operations; NaN where the device is unknown."""
    if "bandwidth" not in roofline:
        return math.nan
    return max(bytes_ / roofline["bandwidth"], flops / roofline.get(dtype, math.inf))
