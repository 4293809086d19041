"""`fp8_linear`: checks, and the choice between the GPU's scaled product and the reference. No module is here."""

import torch
from torch import Tensor

from sana.ops.backend import require_triton
from sana.ops.fp8.reference import Fp8Rows, fp8_linear_reference, quantize_rows

BACKENDS = ("triton", "scaled_mm", "reference")
MULTIPLE = 16  # the GPU's product wants inner and output widths in whole units of 16
CAPABILITIES = (9, 10)  # Hopper and data-centre Blackwell; 12.x has no row scales (pytorch/pytorch#192707)


class Fp8UnavailableError(RuntimeError):
    """A device cannot multiply e4m3 matrices with a scale for each row; the message says what can."""


def require_fp8(device: torch.device) -> None:
    """Checks that PyTorch multiplies e4m3 matrices with row scales on a device.

    Raises:
        Fp8UnavailableError: the device is no CUDA GPU of compute capability 9.x or 10.x.
    """
    found = f"this is device {str(device)!r}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major in CAPABILITIES:
            return
        found = f"this one has {major}.{minor}"
    raise Fp8UnavailableError(
        "fp8 with one scale a row needs an NVIDIA GPU of compute capability 9.x or 10.x (H100, H200, B200), and "
        f"{found}. Leave fp8 off, or use backend='reference', which computes with the same numbers slowly in float32."
    )


def fp8_linear(x: Tensor, weight: Fp8Rows, bias: Tensor | None = None, *, backend: str = "triton") -> Tensor:
    """x W^T + b in e4m3, with a scale for each row of x, found here, and for each output channel.

    For inference: no gradient reaches x or the weight.

    Args:
        x: (..., K), float32, float16 or bfloat16, K a multiple of 16.
        weight: (N, K) from `quantize_rows`, N a multiple of 16.
        bias: (N,).
        backend: "triton" rounds x in one kernel and multiplies on the GPU's fp8 units with a bfloat16 result;
            "scaled_mm" is the same with PyTorch's own operations around the product, which torch.compile can fuse;
            "reference" is `fp8_linear_reference` on any device.

    Returns:
        (..., N), dtype of `x`.

    Raises:
        Fp8UnavailableError: the backend is not "reference" and the device cannot.
        TritonUnavailableError: the backend is "triton", which is not installed.
        ValueError: the backend is unknown, or the shapes do not fit.
    """
    check_backend(backend)
    features, width = weight.values.shape
    if x.shape[-1] != width:
        raise ValueError(f"x has rows of {x.shape[-1]} numbers and the weight takes {width}.")
    check_widths(width, features)
    if backend == "reference":
        return fp8_linear_reference(x, weight, bias)
    require_fp8(x.device)
    flat = x.reshape(-1, width)
    if backend == "triton":
        require_triton(x)
        from sana.ops.fp8.forward import quantize_rows_triton

        rows = quantize_rows_triton(flat)
    else:
        rows = quantize_rows(flat)
    return scaled_product(rows, weight, bias).to(x.dtype).reshape(*x.shape[:-1], features)


def scaled_product(rows: Fp8Rows, weight: Fp8Rows, bias: Tensor | None) -> Tensor:
    """(M, K) times the transpose of (N, K), plus bias: (M, N) bfloat16. On a GPU that `require_fp8` accepts."""
    return torch._scaled_mm(
        rows.values,
        weight.values.t(),  # (K, N) with contiguous columns, the one layout that the hardware reads
        scale_a=rows.scale,  # (M, 1)
        scale_b=weight.scale.t(),  # (1, N)
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the result that every version of the row-scaled kernels has
        use_fast_accum=True,
    )


def gated_convolution(x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """The middle of the Mix-FFN by its Triton kernel: a depthwise 3x3 convolution, then value * silu(gate).

    Args:
        x: (B, N, 2M) activated expansion.
        grid: (H, W) with H * W = N.
        weight: (2M, 1, 3, 3).
        bias: (2M,).

    Returns:
        (B, N, M).

    Raises:
        TritonUnavailableError: Triton cannot run on `x`.
        ValueError: the kernel is not 3x3.
    """
    if tuple(weight.shape[1:]) != (1, 3, 3):
        raise ValueError(f"the depthwise weight must be (2M, 1, 3, 3), not {tuple(weight.shape)}.")
    require_triton(x)
    from sana.ops.mix_ffn import plan
    from sana.ops.mix_ffn.forward import depthwise

    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    taps = weight.reshape(-1, 9).t().contiguous()  # (9, 2M)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    gated = depthwise(flat, grid, taps, bias, gated=True, tile=plan.forward_tile(grid[0], capability))
    return gated.view(*x.shape[:2], -1)


def check_backend(backend: str) -> None:
    """Raises ValueError unless a backend is known."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown fp8 backend {backend!r}; known: {', '.join(BACKENDS)}.")


def check_widths(*widths: int) -> None:
    """Raises ValueError unless the widths are multiples of 16."""
    for width in widths:
        if width % MULTIPLE:
            raise ValueError(f"fp8 needs widths that are multiples of {MULTIPLE}, and {width} is none.")
