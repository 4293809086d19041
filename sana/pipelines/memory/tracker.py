"""Counts the memory of tensors while code runs, on real tensors and on fake ones. What is run is not decided here."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_BLOCK = 512  # bytes: the CUDA allocator hands out whole blocks
Extra = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that operations make, for as long as they live.

    A storage counts once however many views it has; what an operation changes in place costs nothing. With fake
    tensors there are no numbers, so every yes-or-no question about them is answered yes: values are finite, all tokens
    may be read.

    Args:
        block: bytes; every storage is rounded up to a multiple of it.
        extra: (operation, its arguments, its keywords, its result) -> bytes that a kernel holds only while it runs.

    Attributes:
        live: bytes of the counted storages that are alive now.
        peak: the highest that `live` has been, kernels' own memory included.
    """

    def __init__(self, *, block: int = 1, extra: Extra | None = None) -> None:
        super().__init__()
        self.block = block
        self.live = 0
        self.peak = 0
        self._extra = extra
        self._sizes: dict[int, int] = {}  # address of a storage -> its bytes
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._ignored: set[int] = set()
        self._inside = False

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before, such as inputs."""
        for tensor in tensors:
            self._see(tensor)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves tensors out, such as weights; the caller keeps them alive."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def reset_peak(self) -> None:
        """Starts a new search of the peak, from what is alive."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and is_fake(args[0]):  # half of all that is asked
            return args[0].fake_device
        if self._inside:  # what a fake operation does to find its shapes
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            if not is_fake(args[0]):
                return read(args[0])
            if args[0].dtype == torch.bool:
                return True
        self._inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._inside = False
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self._extra is not None:
            self.peak = max(self.peak, self.live + self._extra(func, args, kwargs, result))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._ignored:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        if address not in self._sizes:
            self._watched[address] = weakref.ref(storage, lambda _: self._forget(address))
        self.live += size - self._sizes.get(address, 0)
        self._sizes[address] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address, 0)
        self._watched.pop(address, None)


def read(number: Tensor) -> Any:
    """Returns the value of a real tensor of one number, also where a fake mode is on."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return number.item()


def is_fake(tensor: Any) -> bool:
    """Whether a tensor has a shape and a device but no memory."""
    return type(tensor).__name__ == "FakeTensor"
