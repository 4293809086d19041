"""A mover without a second device: what is away is NaN, what is there is a counted copy. No test is here."""

import weakref

import torch
from torch import Tensor, nn

from sana.models.layers.residency import Mover, as_kind, parts


class StandIn(Mover):
    """Both homes and copies lie in host memory. A tensor that is away reads as NaN, or as an empty one.

    Attributes:
        resident: bytes of the copies that live now.
        peak: their greatest number since `restart`.
        fetched: number of copies made.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.resident = self.peak = self.fetched = 0

    def put_away(self, tensor: Tensor) -> Tensor:
        return as_kind(tensor.detach().clone(), tensor)

    def shown(self, home: Tensor) -> Tensor:
        if not _is_plain(home) or not home.is_floating_point() or home.dtype.itemsize < 2:
            return as_kind(torch.empty(0, dtype=home.dtype), home)
        return as_kind(torch.full_like(home, float("nan")), home)

    def fetch(self, home: Tensor) -> Tensor:
        with torch.inference_mode(_is_plain(home)):  # of such tensors the CPU's operators keep no packed copies
            copied = as_kind(home.detach().clone(), home)
        size = sum(part.nbytes for part in parts(copied))
        self.resident += size
        self.fetched += 1
        self.peak = max(self.peak, self.resident)
        weakref.finalize(copied, self._gone, size)
        return copied

    def restart(self) -> None:
        self.peak, self.fetched = self.resident, 0

    def _gone(self, size: int) -> None:
        self.resident -= size


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
