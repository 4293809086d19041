"""Copies between host and device: what arrives, and that later changes do not."""

import pytest
import torch

from sana.utils.transfer import PendingNumbers, to_device


def test_numbers_are_those_of_the_moment_they_were_sent():
    values = torch.tensor([1.5, float("nan"), -2.0], dtype=torch.float64)
    pending = PendingNumbers(values)
    values.zero_()
    first, second, third = pending.read()
    assert (first, third) == (1.5, -2.0) and second != second
    assert pending.read()[0] == 1.5  # reading is no taking


def test_nothing_is_copied_to_where_it_is():
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
    assert to_device(tensor, torch.device("meta")).is_meta


@pytest.mark.gpu
def test_copies_do_not_wait_for_the_device():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(torch.arange(1000.0), "cuda")
        pending = PendingNumbers(there * 2)
        there.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.read() == [2.0 * number for number in range(1000)]
