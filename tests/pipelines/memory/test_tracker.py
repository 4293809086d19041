"""The tracker's counts against sums done by hand."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.pipelines.memory.tracker import MemoryTracker, is_fake

KIB = 1024


def zeros(count: int) -> torch.Tensor:
    """A float32 tensor of `count` KiB."""
    return torch.zeros(count * KIB // 4)


@pytest.fixture(params=["real", "fake"])
def mode(request):
    """Nothing, or a mode in which tensors have no memory."""
    if request.param == "real":
        yield None
    else:
        with FakeTensorMode() as fake:
            yield fake


def test_the_peak_is_the_most_that_lived_at_a_time(mode) -> None:
    with MemoryTracker() as tracker:
        first = zeros(4)
        second = first + 1  # 8 KiB
        del first  # 4
        third = torch.cat([second, second])  # 12
        assert tracker.live == 12 * KIB
        del second, third
    assert tracker.live == 0
    assert tracker.peak == 12 * KIB


def test_views_and_changes_in_place_are_free(mode) -> None:
    with MemoryTracker() as tracker:
        whole = zeros(8)
        part = whole.view(2, -1)[1]
        part.add_(1)
        whole.relu_()
        torch.add(whole, 1, out=whole)
        del whole
        assert tracker.live == 8 * KIB  # the view keeps all of it
        del part
        assert tracker.live == 0
    assert tracker.peak == 8 * KIB


def test_what_is_held_between_two_operations_counts(mode) -> None:
    with MemoryTracker() as tracker:
        out = zeros(2)
        for _ in range(5):
            out = out * 2  # old and new
    assert tracker.peak == 4 * KIB
    assert tracker.live == 2 * KIB


def test_a_storage_that_grows_counts_anew() -> None:
    with MemoryTracker() as tracker:
        tensor = torch.zeros(KIB, dtype=torch.uint8)
        tensor.resize_(3 * KIB)
    assert tracker.live == 3 * KIB


def test_blocks_are_rounded_up(mode) -> None:
    with MemoryTracker(block=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    assert tracker.peak == 512 + 512 + 1024
    del kept


def test_weights_are_left_out_and_inputs_counted_if_told() -> None:
    weight, given = zeros(16), zeros(1)
    with MemoryTracker() as tracker:
        tracker.ignore([weight])
        tracker.count([given])
        view = weight[:256]
        out = view * given
        assert tracker.live == 2 * KIB
    del out


def test_the_search_of_a_peak_can_begin_anew() -> None:
    with MemoryTracker() as tracker:
        big = zeros(64)
        del big
        tracker.reset_peak()
        small = zeros(1)
    assert tracker.peak == KIB
    del small


def test_kernels_own_memory_is_in_the_peak_only() -> None:
    with MemoryTracker(extra=lambda func, args, kwargs, result: 10 * KIB) as tracker:
        kept = zeros(1)
    assert (tracker.live, tracker.peak) == (KIB, 11 * KIB)
    del kept


def test_what_backward_needs_is_counted_until_it_ran() -> None:
    weight = torch.ones(256, requires_grad=True)
    with MemoryTracker() as tracker:
        tracker.ignore([weight])
        hidden = (weight * 2).exp()  # exp keeps its result
        loss = hidden.exp().sum()
        del hidden
        held = tracker.live
        loss.backward()
        del loss
        gc.collect()
        assert tracker.live == KIB  # the gradient
    assert held == 2 * KIB + 4


def test_fake_tensors_take_no_memory_and_answer_yes() -> None:
    known = torch.tensor(0.5)
    with FakeTensorMode(), MemoryTracker() as tracker:
        huge = torch.empty(2**40, device="cuda")
        assert is_fake(huge)
        assert torch.isfinite(huge[:1]).all()
        assert float(known) == 0.5
    assert tracker.peak >= 2**42
    assert not is_fake(torch.zeros(1))
