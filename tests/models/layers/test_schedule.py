"""Units that come and go: how many are there at a time, in any order of use, after exceptions, with prefetch."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from sana.models.layers.residency import Mover, using
from sana.models.layers.schedule import Residency, Units
from tests.models.layers.stand_in import StandIn

WIDTH = 8
UNIT = (WIDTH * WIDTH + WIDTH) * 4
REST = WIDTH * WIDTH * 4 + WIDTH * 4


class Block(nn.Module):
    """A unit whose forward reads its layer's weight and whose table is read outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, fail: BaseException | None = None) -> Tensor:
        if fail is not None:
            raise fail
        return x + nn.functional.linear(x, self.layer.weight, self.layer.bias)


class Network(nn.Module):
    """Blocks between tensors that stay."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.requires_grad_(False)
        self.register_buffer("unread", torch.zeros(1000))

    def forward(self, x: Tensor, order: tuple[int, ...] | None = None, fail: BaseException | None = None) -> Tensor:
        x = self.start(x)
        for index in order if order is not None else range(len(self.blocks)):
            x = self.blocks[index](x, fail if index == 2 else None)
        return x


def managed(network: Network, *, deep: bool = False, lazy: bool = False, **options) -> tuple[Residency, StandIn]:
    mover = StandIn()
    cut = Units(tuple(network.blocks), (network,), deep=deep, lazy=lazy, unread=("unread",))
    residency = Residency(network, cut)
    residency.offload(mover, **options)
    return residency, mover


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({"group": 0}, 5),
        ({"group": 1}, 1),
        ({"group": 2}, 2),
        ({"group": 1, "prefetch": True}, 2),
        ({"group": 2, "prefetch": True}, 4),
    ],
)
def test_results_and_greatest_memory(options, units, deep):
    network, x = Network(), torch.randn(3, WIDTH)
    orders = (None, None, (4, 1, 1, 0, 3), (2,))
    wanted = [network(x, order) for order in orders]
    residency, mover = managed(network, deep=deep, **options)
    for order, result in zip(orders, wanted, strict=True):
        assert torch.equal(network(x, order), result)
        assert mover.resident == 0
    with residency.use():
        for order, result in zip(orders, wanted, strict=True):
            assert torch.equal(network(x, order), result)
        assert mover.resident >= REST
    assert (mover.resident, mover.peak) == (0, REST + units * UNIT)


def test_the_next_group_is_there_before_it_is_asked_for():
    network = Network()
    residency, mover = managed(network, group=1, prefetch=True)
    there = []
    hook = network.blocks[3].register_forward_pre_hook(
        lambda module, args: there.append(module.layer.weight.isnan().any().item()), prepend=True
    )
    network(torch.randn(1, WIDTH))
    hook.remove()
    assert there == [False]
    with residency.use():
        for _ in range(3):
            mover.restart()
            network(torch.randn(1, WIDTH))
        assert mover.fetched == 2 * 5  # each once a forward: the first group of the next one came with the last


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("options", [{"group": 0}, {"group": 1}, {"group": 2, "prefetch": True}])
def test_after_an_exception_all_is_away_and_the_next_run_right(options, error):
    network, x = Network(), torch.randn(3, WIDTH)
    wanted = network(x)
    residency, mover = managed(network, **options)
    with pytest.raises(type(error)), residency.use():
        network(x, fail=error)
    assert mover.resident == 0 and network.blocks[2].layer.weight.isnan().all()
    assert torch.equal(network(x), wanted) and mover.resident == 0


def test_an_exception_between_forwards():
    network = Network()
    residency, mover = managed(network, group=1, prefetch=True)
    with pytest.raises(RuntimeError), residency.use():
        network(torch.randn(1, WIDTH))
        raise RuntimeError
    assert mover.resident == 0


def test_uses_may_be_nested():
    network, x = Network(), torch.randn(1, WIDTH)
    wanted = network(x)
    residency, mover = managed(network)
    with residency.use():
        with residency.use():
            assert torch.equal(network(x), wanted)
        assert mover.resident == REST + 5 * UNIT
    assert mover.resident == 0 and mover.fetched == 2 * 6


def test_a_lazy_network_waits_for_its_forward():
    network = Network()
    residency, mover = managed(network, lazy=True)
    with residency.use():
        assert mover.fetched == 0
        network(torch.randn(1, WIDTH))
        network(torch.randn(1, WIDTH))
        assert mover.fetched == 2 * 6 and mover.resident
    assert mover.resident == 0


@pytest.mark.parametrize("prefetch", [False, True])
def test_weights_read_outside_a_forward_take_the_place_of_what_was_kept(prefetch):
    network = Network()
    residency, mover = managed(network, group=1, prefetch=prefetch)
    with residency.use():
        network(torch.randn(1, WIDTH))
        mover.restart()
        with using(network.blocks[3].layer):
            assert mover.resident == REST + UNIT and not network.blocks[3].layer.weight.isnan().any()
        assert torch.isfinite(network(torch.randn(1, WIDTH))).all()


def test_a_unit_used_twice_and_inside_itself():
    network, x = Network(1), torch.randn(1, WIDTH)
    wanted = network(x)
    residency, mover = managed(network, group=1)
    with residency.use(), using(network.blocks[0]):
        assert torch.equal(network(x), wanted)
        assert torch.equal(network(x), wanted)
        assert not network.blocks[0].layer.weight.isnan().any()
    assert mover.resident == 0


def test_casting_is_for_the_running_unit_only():
    network, x = Network(), torch.randn(3, WIDTH)
    for parameter in network.blocks.parameters():
        parameter.copy_(parameter.half())
    wanted = network(x)
    residency, mover = managed(network, group=1, prefetch=True)
    assert residency.cast(torch.float16, None, lambda slot: slot.home.dim() == 2) == 5
    assert residency.cast(torch.float16, None, lambda slot: slot.home.dim() == 2) == 0
    assert torch.equal(network(x), wanted) and mover.resident == 0
    assert mover.peak == REST + 2 * (UNIT - 2 * WIDTH * WIDTH)
    assert torch.equal(network(x), wanted)
    residency.offload(None)
    assert network.blocks[0].layer.weight.dtype == torch.float16 and torch.equal(network(x), wanted)
    residency.close()
    assert network.blocks[0].layer.weight.dtype == torch.float32 and torch.equal(network(x), wanted)


def test_the_kind_may_change_and_end():
    network, x = Network(), torch.randn(3, WIDTH)
    wanted, state = network(x), copy.deepcopy(network.state_dict())
    residency, mover = managed(network, group=1)
    network(x)
    other = StandIn()
    residency.offload(other)
    assert not network.blocks[0]._forward_pre_hooks  # a block could be compiled
    assert torch.equal(network(x), wanted) and mover.resident == 0 < other.fetched
    residency.close()
    assert torch.equal(network(x), wanted) and other.resident == 0
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not network._forward_hooks and not network.blocks[0]._forward_pre_hooks
    assert copy.deepcopy(network).to(torch.float64).start.weight.dtype == torch.float64


def test_a_managed_network_refuses_to_be_moved_or_copied():
    network = Network()
    residency, _ = managed(network)
    assert network.to("cpu") is network and network.to("cpu", torch.float32) is network
    for move in (lambda: network.to("meta"), network.half, lambda: network.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"Network is kept away .* call disable_offload\(\) first"):
            move()
    with pytest.raises(ValueError, match="Network cannot be copied"):
        copy.deepcopy(network)
    residency.close()


def test_nothing_is_kept_alive():
    network = Network()
    residency, mover = managed(network)
    gone = weakref.ref(network)
    del network, residency
    gc.collect()
    assert gone() is None and mover.resident == 0


def test_units_of_a_running_network_do_not_change():
    network = Network()
    residency, mover = managed(network)
    with residency.use(), pytest.raises(AssertionError, match="in use"):
        residency.offload(mover, group=1)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [False, True])
def test_groups_on_cuda_stay_within_two_units(prefetch):
    """Many large blocks, asked for faster than they compute: the same numbers, and never a third unit."""
    width, depth = 2048, 12
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).requires_grad_(False)
    x, unit = torch.randn(4096, width, device="cuda"), (width * width + width) * 4
    wanted = copy.deepcopy(network).cuda()(x)
    torch.cuda.synchronize()
    residency = Residency(network, Units(tuple(network), (network,)))
    residency.offload(Mover(torch.device("cuda"), prefetch=prefetch), group=1, prefetch=prefetch)
    with residency.use():
        for _ in range(3):
            assert torch.equal(network(x), wanted)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network(x)
        torch.cuda.synchronize()
        activations = 3 * x.nbytes
        assert torch.cuda.max_memory_allocated() - before <= 2 * unit + activations
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_copies_run_beside_the_computation():
    """With prefetch a group is asked for while the one before it computes: its copy begins before that one's end."""
    width = 4096
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(6))).requires_grad_(False)
    residency = Residency(network, Units(tuple(network), (network,)))
    residency.offload(Mover(torch.device("cuda"), prefetch=True), group=1, prefetch=True)
    x = torch.randn(16384, width, device="cuda")
    with residency.use():
        network(x)
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            network(x)
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event.time_range for event in events if "Memcpy HtoD" in event.name]
    kernels = [event.time_range for event in events if "gemm" in event.name.lower()]
    overlapping = [c for c in copies if any(c.start < k.end and k.start < c.end for k in kernels)]
    assert len(overlapping) >= 4
