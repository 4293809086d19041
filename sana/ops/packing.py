"""Copies of weights in the layout that oneDNN wants, made once. What is computed with them is not here.

The operators are those that torch.compile emits for frozen weights.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

GIB = 2**30

# weight -> {part: (what it was when it was packed, its storage, the packed copy)}; an entry goes with its weight.
# The weak reference keeps the storage's address from being given to another one.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_budget: dict[str, int] = {}  # "bytes": what `set_pack_budget` was given


def pack(weight: Tensor, part: object, make: Callable[[], Tensor]) -> Tensor | None:
    """Returns the packed copy of a weight or a part of it, made at the first use and kept, up to `pack_budget()` bytes.

    A copy is made anew after the weight was changed by any in-place operation, moved or cast; changes through `.data`
    are not seen. A weight that requires gradients, or that has no version, is not packed: it may change at any time.

    Args:
        weight: whose copy it is.
        part: names the part; None for all of it.
        make: packs that part.

    Returns:
        The copy, or None where there is none: the weight is to be used as it is.
    """
    if weight.requires_grad or weight.is_inference():
        return None
    copies = _packed.get(weight)
    storage = weight.untyped_storage()
    state = (storage._cdata, weight.data_ptr(), weight._version, weight.dtype)
    if copies is not None and part in copies and copies[part][0] == state:
        return copies[part][2]
    copies = _packed.setdefault(weight, {})
    copies.pop(part, None)
    used = sum(packed.nbytes for parts in _packed.values() for *_, packed in parts.values())
    if used + weight.nbytes > pack_budget():
        return None
    packed = make()
    copies[part] = (state, StorageWeakRef(storage), packed)
    return packed


def packable(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes with these: dtypes that it is good at, and no weight that computes in its own way."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and type(weight) in (Tensor, torch.nn.Parameter)
        and available()
    )


def available() -> bool:
    """Whether this PyTorch has oneDNN's operators for frozen weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_budget() -> int:
    """Bytes that packed copies may take in all: a quarter of the memory, at most 4 GiB; 1 GiB where it is not known."""
    if "bytes" in _budget:
        return _budget["bytes"]
    if not hasattr(os, "sysconf"):
        return GIB
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, 4 * GIB)


def set_pack_budget(limit: int | None) -> None:
    """Sets what `pack_budget()` returns; copies that are there already stay, unless the limit is 0.

    Args:
        limit: bytes; 0 keeps no copies, None asks the machine again.

    Raises:
        ValueError: the limit is negative or no whole number.
    """
    if limit is None:
        _budget.clear()
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"The budget of packed copies must be a number of bytes from 0, or None, not {limit!r}.")
    _budget["bytes"] = limit
    if limit == 0:
        _packed.clear()
