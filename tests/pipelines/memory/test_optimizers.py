"""Formulas of optimisers against the state and the allocations of a real step."""

import pytest
import torch
from torch import nn

from sana.config import ConfigError
from sana.pipelines.memory.optimizers import OPTIMIZERS, state_bytes, step_bytes
from sana.training import optimizer as real
from tools.measure_memory import measured_peak

PACKAGES = {
    "AdamW8bit": "bitsandbytes",
    "AdamW8bitWrapper": "bitsandbytes",
    "CAME": "came_pytorch",
    "Prodigy": "prodigyopt",
}


def network() -> nn.Module:
    """Every kind of parameter that the formulas tell apart, large and small."""
    layers = {
        "linear": nn.Linear(256, 384),
        "small": nn.Linear(20, 30),
        "point_conv": nn.Conv2d(128, 256, 1),
        "depth_conv": nn.Conv2d(256, 256, 3, groups=256),
        "final_layer": nn.Linear(256, 64),
        "norm": nn.LayerNorm(64),
    }
    return nn.ModuleDict(layers)


def stored(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of an optimiser's state, shared ones once; an optimiser made of two has both's."""
    parts = [optimizer, *(one for one in vars(optimizer).values() if isinstance(one, torch.optim.Optimizer))]
    states = [state for part in parts for state in part.state.values() if isinstance(state, dict)]
    tensors = [one for state in states for one in state.values() if isinstance(one, torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def test_every_optimiser_that_trains_is_known() -> None:
    assert set(OPTIMIZERS) == set(real.OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_and_step_of_a_real_run(name) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    module, options = network(), {"type": name, "lr": 1e-4}
    parameters = [(key, tuple(one.shape)) for key, one in module.named_parameters()]
    optimizer = real.build_optimizer(module.named_parameters(), options)
    for one in module.parameters():
        one.grad = torch.randn_like(one)
    optimizer.step()
    assert state_bytes(options, parameters) == pytest.approx(stored(optimizer), rel=1e-3)
    largest = max(one.nbytes for one in module.parameters())
    assert (
        abs(step_bytes(options, parameters) - measured_peak(optimizer.step, "cpu")) <= 3 * largest
    )  # of a real network it is a hundredth


def test_blocks_of_eight_bits_are_options() -> None:
    parameters = [("weight", (4096, 64))]
    plain = state_bytes({"type": "CAME8BitWrapper"}, parameters)
    assert plain == 4096 * 64 + (2 * 2 + 2 * (4096 + 64)) * 4
    assert state_bytes({"type": "CAME8BitWrapper", "block_size": 64}, parameters) == plain + 2 * 62 * 4
    assert state_bytes({"type": "CAME8BitWrapper", "min_8bit_size": 10**6}, parameters) > 4 * 4096 * 64


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ConfigError, match="type 'AdamX' is not predicted. Did you mean"):
        state_bytes({"type": "AdamX"}, [])
