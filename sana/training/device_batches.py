"""Batches on their way to the device, beside the computation of the step before. Reading them is not done here."""

import torch

from sana.data.collate import Batch


class DeviceCopies:
    """Copies batches to a device; on CUDA on a stream of its own.

    The training loop runs ahead of a CUDA device: while that computes a step, the host already asks for the copy of the
    next batch, which this stream makes at once. The computation of the next step waits for it there, the host never.

    Args:
        device: where batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch on the device, to be used on the current stream."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            copied = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        copied.record_stream(current)  # their memory is not given away before that stream has read it
        return copied
