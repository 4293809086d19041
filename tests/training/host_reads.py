"""A stand-in for a device on a machine without one: tensors that refuse to tell the host what they hold."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_any, tree_map

aten = torch.ops.aten
READS = {  # operators whose result, or the shape of it, the host learns from the device
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default,
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.allclose.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class HostReadError(AssertionError):
    """The host asked for a value and would have waited for the device."""


class OnDevice(torch.Tensor):
    """A tensor as on a device. Copies that do not wait (`copy_(..., non_blocking=True)`) are allowed, reads are not."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=inner.device,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS or (func in INDEXED and tree_any(_is_boolean, args[1])):
            raise HostReadError(f"{func} reads from the device")
        if func is aten.copy_.default and not isinstance(args[0], OnDevice):
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                raise HostReadError("a copy to the host that waits")
            args[0].copy_(args[1].inner)
            return args[0]
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_outer, out))

    def tolist(self) -> Any:
        raise HostReadError("tolist reads from the device")

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise HostReadError("numpy reads from the device")

    def cpu(self, *_: Any, **__: Any) -> Any:
        raise HostReadError("cpu waits for the device")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _outer(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


def _is_boolean(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def put_on_device(module: nn.Module) -> nn.Module:
    """Replaces all parameters and buffers of a module, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
