"""The schemes of quantisation as data: what a weight takes, where a scheme runs, which package it needs.

Nothing is quantised here: the arithmetic is in `kernels.py`, which layers are concerned in `layers.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scheme:
    """One way to store the weight (N, K) of a linear layer.

    Attributes:
        name: as users write it.
        bits: of one stored number.
        group: numbers of a row that share a scale, largest first: the first one that divides K is taken. () is the
            whole row. Where none divides K, `nf4` counts along the flattened weight, in its largest groups.
        group_bytes: what a scale takes, with its zero point where there is one.
        multiple: (of N, of K) that the kernel asks for.
        devices: device types that it runs on.
        capability: least and greatest major compute capability of CUDA devices, ends included.
        package: distribution that makes and runs it, "" for none.
        extra: of `pip install 'sana-python[...]'` that brings the package.
        what: in words, for messages.
    """

    name: str
    bits: int
    group: tuple[int, ...]
    group_bytes: int
    multiple: tuple[int, int]
    devices: tuple[str, ...]
    capability: tuple[int, int]
    package: str
    what: str

    @property
    def extra(self) -> str:
        return self.package

    @property
    def hardware(self) -> str:
        """Where it runs, in words."""
        low, high = self.capability
        if low:
            newer = " or newer" if high == ANY else f" to {high}.x"
            cuda = f"CUDA devices of compute capability {low}.0{newer}"
        else:
            cuda = "CUDA devices"
        return " and ".join(cuda if one == "cuda" else "the CPU" for one in self.devices)


ANY = 99
SCHEMES: dict[str, Scheme] = {
    one.name: one
    for one in (
        # One float32 scale a row (torchao Int8Tensor); the zero point is 0.
        Scheme("int8", 8, (), 4, (1, 1), ("cpu", "cuda"), (0, ANY), "torchao", "8-bit weights"),
        # cuBLAS multiplies int8 matrices in whole units of 8 numbers.
        Scheme("int8-dynamic", 8, (), 4, (8, 8), ("cpu", "cuda"), (8, ANY), "torchao", "8-bit weights and inputs"),
        # A bfloat16 scale and zero point a group; blocks of 8 rows and 32 columns are what the kernel reads.
        Scheme("int4", 4, (64, 32), 4, (8, 32), ("cuda",), (8, ANY), "torchao", "4-bit weights"),
        # A float32 scale a group; the 16 levels are those of Dettmers et al. 2023 (QLoRA).
        Scheme("nf4", 4, (64, 32), 4, (1, 2), ("cpu", "cuda"), (0, ANY), "bitsandbytes", "4-bit normal-float weights"),
        # One float32 scale a row; `sana.ops.fp8`.
        Scheme("fp8", 8, (), 4, (16, 16), ("cuda",), (9, 10), "", "e4m3 weights and inputs"),
    )
}


def scheme_of(name: str) -> Scheme:
    """Returns a scheme by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SCHEMES:
        raise ValueError(f"Unknown quantisation {name!r}; known: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def is_stored_key(key: str) -> bool:
    """Whether the key of a tensor is that of a quantised weight, as `blocks.0.attn.qkv.int8_values`."""
    leaf = key.rpartition(".")[2]
    return leaf.endswith("_values") and leaf.removesuffix("_values").replace("_", "-") in SCHEMES


def group_size(width: int, scheme: Scheme) -> int:
    """Returns how many of the K = `width` numbers of a row share a scale.

    Raises:
        ValueError: no group size of the scheme divides the width.
    """
    if not scheme.group:
        return width
    for size in scheme.group:
        if width % size == 0:
            return size
    if scheme.name == "nf4":
        return scheme.group[0]
    raise ValueError(f"{scheme.name} needs rows of a multiple of {scheme.group[-1]} numbers, and {width} is none.")


def check_shape(shape: Sequence[int], scheme: Scheme) -> tuple[int, int]:
    """Returns (N, K) of a weight (N, K) or (N, K, 1, 1).

    Raises:
        ValueError: it is no matrix, or the scheme cannot store these widths.
    """
    if len(shape) < 2 or any(size != 1 for size in shape[2:]):
        raise ValueError(f"A weight of shape {tuple(shape)} is no matrix: only linear layers are quantised.")
    rows, width = int(shape[0]), int(shape[1])
    for size, multiple, where in zip((rows, width), scheme.multiple, ("outputs", "inputs"), strict=True):
        if size % multiple:
            raise ValueError(
                f"{scheme.name} needs a number of {where} that is a multiple of {multiple}, and {size} is none."
            )
    group_size(width, scheme)
    return rows, width


def quantized_bytes(shape: Sequence[int], scheme: str | None, dtype: torch.dtype) -> int:
    """Returns the bytes that a weight takes, scales included, the layer's bias not.

    Args:
        shape: (N, K), or (N, K, 1, 1) of a 1x1 convolution.
        scheme: name of a scheme; None: the weight stays as it is.
        dtype: of a weight that stays as it is; quantised ones take the same in every dtype.

    Raises:
        ValueError: the scheme is unknown, or cannot store this shape.
    """
    if scheme is None:
        return math.prod(shape) * dtype.itemsize
    found = scheme_of(scheme)
    rows, width = check_shape(shape, found)
    size = group_size(width, found)
    return rows * width * found.bits // 8 + -(-rows * width // size) * found.group_bytes
