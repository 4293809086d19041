"""How each scheme packs a weight and multiplies by it: torchao, bitsandbytes and `sana.ops.fp8`. No module is here.

Packed weights are plain tensors, so that they are saved, hashed and moved like any others; what torchao and
bitsandbytes want around them is put around them for the time of a product.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.models.quantization.schemes import ANY, SCHEMES, Scheme, check_shape, group_size
from sana.ops.fp8.function import fp8_linear
from sana.ops.fp8.reference import FP8, Fp8Rows, quantize_rows

Parts = tuple[Tensor, ...]
Spec = tuple[tuple[int, ...], torch.dtype]
INT4_TILES = (8, 4, 2)  # inner tiles of 16 numbers that the int4 kernel knows; the most that divide K are taken


class QuantizationUnavailableError(ValueError):
    """A scheme cannot run here: the device or a package is missing. Says what can; there is no silent fallback."""


@dataclass(frozen=True)
class Kernel:
    """The arithmetic of a scheme.

    Attributes:
        names: of the stored tensors.
        specs: (N, K) -> shape and dtype of each.
        pack: weight (N, K) of any floating dtype -> the stored tensors, on its device.
        multiply: x (..., K), stored tensors, (N, K), bias (N,) or None -> (..., N) in the dtype of x.
        pack_on: device type that packing needs; "" packs anywhere, with the same bits.
    """

    names: tuple[str, ...]
    specs: Callable[[int, int], tuple[Spec, ...]]
    pack: Callable[[Tensor], Parts]
    multiply: Callable[[Tensor, Parts, tuple[int, int], Tensor | None], Tensor]
    pack_on: str = ""


def require(name: str, device: torch.device) -> None:
    """Checks that a scheme runs on a device and that its package is installed.

    Raises:
        QuantizationUnavailableError: it does not; the message says which schemes do.
    """
    scheme = SCHEMES[name]
    if not _runs_on(scheme, device):
        others = [one.name for one in SCHEMES.values() if _runs_on(one, device)]
        what = str(device)
        if device.type == "cuda":
            what += " of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
        raise QuantizationUnavailableError(
            f"{name} runs on {scheme.hardware}; this model is on {what}: "
            f"use {' or '.join(others) if others else 'no quantisation'}."
        )
    require_package(name)


def require_package(name: str) -> None:
    """Checks that the package of a scheme is installed.

    Raises:
        QuantizationUnavailableError: it is not; the message names the extra.
    """
    scheme = SCHEMES[name]
    if scheme.package and importlib.util.find_spec(scheme.package) is None:
        raise QuantizationUnavailableError(
            f"{name} needs {scheme.package}, which is not installed: pip install 'sana-python[{scheme.extra}]'."
        )


def _runs_on(scheme: Scheme, device: torch.device) -> bool:
    if device.type not in scheme.devices:
        return False
    low, high = scheme.capability
    if device.type != "cuda" or (low, high) == (0, ANY):
        return True
    return low <= torch.cuda.get_device_capability(device)[0] <= high


def _rows_spec(dtype: torch.dtype) -> Callable[[int, int], tuple[Spec, ...]]:
    return lambda rows, width: (((rows, width), dtype), ((rows, 1), torch.float32))


def _pack_int8(weight: Tensor) -> Parts:
    from torchao.quantization import Int8Tensor, PerRow

    packed = Int8Tensor.from_hp(weight, granularity=PerRow())
    return packed.qdata, packed.scale


def _multiply_int8(x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    from torchao.quantization import Int8Tensor

    weight: Any = Int8Tensor(*parts, [1, shape[1]], x.dtype)
    return F.linear(x, weight, bias)


def _multiply_int8_dynamic(x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """As torchao's linear with an `act_quant_kwargs` of `PerRow()`, spelt so that torch.compile can read it."""
    from torchao.kernel import int_scaled_matmul
    from torchao.quantization import Int8Tensor, PerRow

    values, scale = parts
    rows = Int8Tensor.from_hp(x.reshape(-1, shape[1]), granularity=PerRow())
    if x.device.type == "cpu":
        product = torch._int_mm(rows.qdata, values.t()) * rows.scale
    else:
        product = int_scaled_matmul(rows.qdata, values.t(), rows.scale)
    out = product.to(x.dtype) * scale.flatten()  # float32
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], shape[0])


def int4_values(weight: Tensor) -> Parts:
    """Returns numbers 0..15 (N, K) int32, and bfloat16 scales and zero points (K / group, N, 2): w = (q - 8) s + z."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_qparams_affine_tinygemm,
        _quantize_affine_tinygemm,
    )
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    weight = weight.to(torch.bfloat16)  # what the kernel computes in
    rows, width = weight.shape
    block = (1, group_size(width, SCHEMES["int4"]))
    limits: dict[str, Any] = {"quant_min": 0, "quant_max": 15}
    scale, zero = _choose_qparams_affine_tinygemm(
        weight,
        mapping_type=MappingType.ASYMMETRIC,
        block_size=block,
        target_dtype=torch.int32,
        scale_dtype=weight.dtype,
        zero_point_dtype=weight.dtype,
        **limits,
    )
    values = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, **limits)
    return values, pack_tinygemm_scales_and_zeros(scale.reshape(rows, -1), zero.reshape(rows, -1), scale.dtype)


def int4_tiles(width: int) -> int:
    """Returns the number of inner tiles of the int4 kernel for rows of `width` numbers, a multiple of 32.

    torchao pads rows to a multiple of 1024 for 8 tiles, which would store 1152 numbers as 2048.
    """
    return next(tiles for tiles in INT4_TILES if width % (16 * tiles) == 0)


def _pack_int4(weight: Tensor) -> Parts:
    values, scale_and_zero = int4_values(weight)
    nibbles = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8).contiguous()  # (N, K / 2)
    return torch.ops.aten._convert_weight_to_int4pack(nibbles, int4_tiles(weight.shape[1])), scale_and_zero


def _spec_int4(rows: int, width: int) -> tuple[Spec, ...]:
    tiles, group = int4_tiles(width), group_size(width, SCHEMES["int4"])
    return (
        ((rows // 8, width // (16 * tiles), 32, tiles // 2), torch.int32),
        ((width // group, rows, 2), torch.bfloat16),
    )


def _multiply_int4(x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    values, scale_and_zero = parts
    group = group_size(shape[1], SCHEMES["int4"])
    rows = x.reshape(-1, shape[1]).to(torch.bfloat16)
    out = torch.ops.aten._weight_int4pack_mm(rows, values, group, scale_and_zero)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).reshape(*x.shape[:-1], shape[0])


def _spec_nf4(rows: int, width: int) -> tuple[Spec, ...]:
    groups = -(-rows * width // group_size(width, SCHEMES["nf4"]))
    return ((rows, width // 2), torch.uint8), ((groups,), torch.float32)


def _pack_nf4(weight: Tensor) -> Parts:
    from bitsandbytes.functional import quantize_4bit

    size = group_size(weight.shape[1], SCHEMES["nf4"])
    values, state = quantize_4bit(weight.contiguous(), blocksize=size, quant_type="nf4")
    return values.view(len(weight), -1), state.absmax


def _multiply_nf4(x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState, dequantize_4bit

    values, absmax = (part.view(-1) for part in parts)
    size = group_size(shape[1], SCHEMES["nf4"])
    bias = None if bias is None else bias.to(x.dtype)
    # bitsandbytes 0.50 reads wrong scales on a CPU for groups that run on from row to row, unless it sees one long row.
    whole_rows = shape[1] % size == 0
    seen = torch.Size(shape if whole_rows else (shape[0] * shape[1],))
    state = QuantState(absmax=absmax, shape=seen, blocksize=size, quant_type="nf4", dtype=x.dtype)
    if whole_rows:
        return matmul_4bit(x, values[:, None], state, bias=bias)
    return F.linear(x, dequantize_4bit(values[:, None], state).view(shape), bias)


def _multiply_fp8(x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    return fp8_linear(x, Fp8Rows(*parts), bias, backend="scaled_mm")


_ROWS = ("values", "scale")
KERNELS = {
    "int8": Kernel(_ROWS, _rows_spec(torch.int8), _pack_int8, _multiply_int8),
    "int8-dynamic": Kernel(_ROWS, _rows_spec(torch.int8), _pack_int8, _multiply_int8_dynamic),
    "int4": Kernel(("values", "scale_and_zero"), _spec_int4, _pack_int4, _multiply_int4, pack_on="cuda"),
    "nf4": Kernel(("values", "absmax"), _spec_nf4, _pack_nf4, _multiply_nf4),
    "fp8": Kernel(_ROWS, _rows_spec(FP8), lambda weight: tuple(quantize_rows(weight)), _multiply_fp8),
}


def pack(name: str, weight: Tensor, on: torch.device | None = None) -> Parts:
    """Returns the stored tensors of a weight, on its device.

    They are computed on the CPU where the scheme allows it, so that they have the same bits on every machine.

    Args:
        name: of the scheme.
        weight: (N, K) or (N, K, 1, 1), float32, float16 or bfloat16.
        on: device that the scheme runs on, for schemes that can be packed nowhere else; None: that of the weight.

    Raises:
        ValueError: the scheme cannot store this shape.
    """
    check_shape(weight.shape, SCHEMES[name])
    kernel = KERNELS[name]
    where = (on or weight.device) if kernel.pack_on else torch.device("cpu")
    parts = kernel.pack(weight.detach().flatten(1).to(where))
    return tuple(part.to(weight.device) for part in parts)
