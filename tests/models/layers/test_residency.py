"""Tensors that come and go: one at a time, counted, tied, quantised, cast; and what a module shows meanwhile."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sana.models.layers import residency
from sana.models.layers.residency import (
    SLOTS,
    acquired,
    compute_device,
    compute_dtype,
    forget,
    home_parameters,
    manage,
    move,
    parts,
    range_scale,
    slots_below,
    using,
)
from tests.models.layers.stand_in import StandIn


class Network(nn.Module):
    """Two layers, one weight of which is tied, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.table


@pytest.fixture
def network():
    made = Network().requires_grad_(False)
    yield made
    forget(made)


@pytest.fixture
def mover():
    return StandIn()


def put_away(network: nn.Module, mover: StandIn) -> list[residency.Slot]:
    slots = manage(network)
    for slot in slots:
        slot.live_with(mover)
    return slots


def test_what_is_away_cannot_be_computed_with(network, mover):
    x = torch.randn(2, 8)
    wanted = network(x)
    put_away(network, mover)
    assert network(x).isnan().all()
    with using(network):
        assert torch.equal(network(x), wanted)
    assert network(x).isnan().all() and mover.resident == 0


def test_tied_weights_are_one_tensor_and_stay_tied(network, mover):
    assert [slot.name for slot in put_away(network, mover)] == ["table", "first.weight", "first.bias", "second.bias"]
    with using(network.second):
        assert network.first.weight is network.second.weight and not network.second.weight.isnan().any()
        assert network.first.bias.isnan().all()
    assert mover.fetched == 2


def test_users_are_counted(network, mover):
    put_away(network, mover)
    with using(network.first):
        inside = network.first.weight
        with using(network), using(network.second):
            assert network.first.weight is inside
        assert network.first.weight is inside and network.table.isnan().all()
        assert mover.resident == (64 + 8) * 4
        del inside
    assert mover.resident == 0 and mover.fetched == 4


def test_an_exception_inside_lets_everything_go(network, mover):
    put_away(network, mover)
    with pytest.raises(KeyboardInterrupt), using(network):
        raise KeyboardInterrupt
    assert mover.resident == 0 and network.first.weight.isnan().all()


def test_where_memory_runs_out_nothing_is_left_behind(network, mover, monkeypatch):
    slots, fetch = put_away(network, mover), mover.fetch
    monkeypatch.setattr(mover, "fetch", lambda home: fetch(home) if mover.fetched < 2 else pytest.fail("full"))
    with pytest.raises(pytest.fail.Exception, match="full"), using(network):
        pytest.fail("never entered")
    assert mover.resident == 0 and not any(slot.resident for slot in slots)


def test_without_management_it_does_nothing(network):
    with using(network):
        assert next(slots_below(network), None) is None
    assert list(home_parameters(network)) == list(network.parameters())
    assert compute_device(network) == torch.device("cpu") and compute_dtype(network) == torch.float32


def test_parameters_stay_parameters_and_keep_their_layout(mover):
    network = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    put_away(network, mover)
    for context in (acquired(()), using(network)):
        with context:
            assert type(network.weight) is nn.Parameter and not network.weight.requires_grad
            assert network.weight.is_contiguous(memory_format=torch.channels_last)


def test_home_parameters_are_the_same_before_during_and_after(network, mover):
    put_away(network, mover)
    before = [id(one) for one in home_parameters(network)]
    with using(network):
        assert [id(one) for one in home_parameters(network)] == before
    assert [id(one) for one in home_parameters(network)] == before


def test_a_network_has_one_manager(network):
    manage(network.first)
    with pytest.raises(ValueError, match="Network is offloaded already"):
        manage(network)


def test_a_dead_network_is_forgotten(mover):
    before = len(SLOTS)
    network = Network()
    put_away(network, mover)
    assert len(SLOTS) == before + 3
    del network
    assert len(SLOTS) == before


@given(exponent=st.integers(-30, 30), values=st.lists(st.floats(1 / 64, 1.0, width=32), min_size=1, max_size=20))
def test_the_range_of_8_bits_is_used(exponent, values):
    """Whatever their size, weights fill the upper half of the range, and dividing by the scale is exact."""
    tensor = torch.tensor(values) * 2.0**exponent
    scale = range_scale(tensor, torch.float8_e4m3fn)
    assert torch.equal(tensor / scale * scale, tensor) and scale == 2.0 ** round(torch.tensor(scale).log2().item())
    assert 224 < (tensor / scale).abs().max() <= 448
    assert range_scale(tensor, torch.bfloat16) == range_scale(torch.zeros(3), torch.float8_e4m3fn) == 1.0


def test_small_weights_profit_from_the_scale():
    """Weights of a wide layer, some thousandths large, are subnormal numbers in e4m3 without it."""
    weight = torch.randn(512, 512) / 500
    scale = range_scale(weight, torch.float8_e4m3fn)
    errors = [
        float(((weight / factor).to(torch.float8_e4m3fn).float() * factor - weight).norm() / weight.norm())
        for factor in (scale, 1.0)
    ]
    assert errors[0] < 0.03 and errors[1] > 5 * errors[0]


def test_stored_weights_are_rounded_once_and_cast_at_use(network):
    exact = network.first.weight.clone()
    slot = next(slot for slot in manage(network) if slot.name == "first.weight")
    slot.store(torch.float8_e4m3fn, torch.float32)
    assert network.first.weight.dtype == torch.float8_e4m3fn
    with pytest.raises(RuntimeError):
        network.first(torch.randn(2, 8))
    with using(network.first):
        once = network.first.weight.clone()
        assert once.dtype == torch.float32 and compute_dtype(network) == torch.float32
    large = exact.abs() > exact.abs().max() / 2**12  # normal numbers of e4m3 have three bits behind the first
    assert ((once - exact).abs() <= exact.abs() / 2**4)[large].all() and not torch.equal(once, exact)
    slot.widen()
    assert torch.equal(network.first.weight, once) and network.second.weight is network.first.weight


def test_stored_weights_may_be_away_too(network, mover):
    slots = put_away(network, mover)
    with using(network):
        exact = network.first.weight.clone()
    for slot in slots:
        if slot.name == "first.weight":
            slot.store(torch.float16, torch.float32)
    with acquired(slots, cast=False):
        assert network.first.weight.dtype == torch.float16
        with using(network):
            assert torch.equal(network.first.weight, exact.half().float())
        assert network.first.weight.dtype == torch.float16
    assert mover.resident == 0


def test_a_quantised_weight_of_torchao_comes_and_goes(mover):
    quantization = pytest.importorskip("torchao.quantization")
    network = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig(version=2))
    x = torch.randn(2, 32)
    wanted, kind = network(x), type(network[0].weight)
    assert kind is not nn.Parameter and len(list(parts(network[0].weight))) >= 2
    put_away(network, mover)
    with using(network):
        assert torch.equal(network(x), wanted) and type(network[0].weight) is kind
    assert mover.resident == 0


def test_a_4_bit_weight_takes_scales_of_its_own_along():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").requires_grad_(False)
    layer = layer.to("cpu")
    home = layer.weight
    absmax = home.quant_state.absmax
    away = move(home, torch.device("meta"))
    assert away.is_meta and away.quant_state.absmax.is_meta
    assert home.quant_state.absmax is absmax and not home.quant_state.absmax.is_meta
    assert sum(part.nbytes for part in parts(home)) > home.nbytes


def test_a_copy_of_a_module_is_not_managed(network, mover):
    put_away(network, mover)
    copied = copy.deepcopy(network)
    assert next(slots_below(copied), None) is None


@pytest.mark.gpu
def test_page_locked_homes_on_cuda():
    network = Network().requires_grad_(False)
    x = torch.randn(2, 8)
    wanted = network.cuda()(x.cuda())
    mover = residency.Mover(torch.device("cuda"))
    for slot in manage(network):
        slot.live_with(mover)
    assert network.first.weight.is_pinned() and compute_device(network).type == "cuda"
    with pytest.raises(RuntimeError):
        network(x.cuda())
    with using(network):
        assert torch.equal(network(x.cuda()), wanted)
    assert network.table.device.type == "cpu"
