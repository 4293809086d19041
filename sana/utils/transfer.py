"""Copies between host and device that neither side waits for. Nothing here knows what is copied."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a tensor to a device; to a CUDA device through page-locked memory, without waiting for it.

    A plain `.to("cuda")` of ordinary memory waits until everything that was asked of the device before is done.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class PendingNumbers:
    """Numbers on their way from the device to the host.

    Args:
        values: (n,) on any device; they may change afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        pinned = values.device.type == "cuda"
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        self._host.copy_(values.detach(), non_blocking=True)
        if pinned:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Waits for what the device had been asked before the numbers, not for what came after; returns them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
