"""8-bit CAME: the error of its levels, blocks of rows, equal values, and what stays in float32."""

import pytest
import torch
from torch import nn

from sana.training.came import CAMEWrapper
from sana.training.came_8bit import CAME8BitWrapper, dequantise, quantise_into


def round_trip(values: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = -(-len(values) // block_size)
    stored, scale, low = torch.empty(values.shape, dtype=torch.uint8), torch.empty(blocks), torch.empty(blocks)
    quantise_into(stored, scale, low, values, block_size)
    return dequantise(stored, scale, low, block_size)


@pytest.mark.parametrize("block_size", [1, 3, 7, 100])
def test_no_value_is_more_than_half_a_level_off(block_size: int) -> None:
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    for ours, exact in zip(round_trip(values, block_size).split(block_size), values.split(block_size), strict=True):
        level = (exact.max() - exact.min()) / 255
        assert float((ours - exact).abs().max()) <= 0.501 * float(level)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_equal_values_come_back(value: float) -> None:
    values = torch.full((4, 3), value)
    assert torch.equal(round_trip(values, 2), values)


def test_only_large_matrices_are_quantised_and_a_restart_keeps_the_bytes() -> None:
    shapes = {"large": (20, 10), "small": (4, 4), "vector": (300,), "kernel": (10, 10, 3, 3)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = CAME8BitWrapper(parameters.values(), 1e-2, block_size=8, min_8bit_size=16)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    dtypes = {name: optimizer.state[parameter]["exp_avg"].dtype for name, parameter in parameters.items()}
    assert dtypes == {
        "large": torch.uint8, "small": torch.float32, "vector": torch.float32, "kernel": torch.float32
    }  # fmt: skip
    assert optimizer.state[parameters["large"]]["exp_avg_scale"].shape == (3,)
    fresh = CAME8BitWrapper([nn.Parameter(p.detach().clone()) for p in parameters.values()], 1e-2, block_size=8)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["min_8bit_size"] == 16
    loaded = fresh.state[fresh.param_groups[0]["params"][0]]["exp_avg"]
    assert loaded.dtype == torch.uint8
    assert torch.equal(loaded, optimizer.state[parameters["large"]]["exp_avg"])


def test_it_stays_near_the_32_bit_trajectory() -> None:
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 40, 30, generator=generator)
    results = []
    for kind, options in ((CAMEWrapper, {}), (CAME8BitWrapper, {"min_8bit_size": 16})):
        parameter = nn.Parameter(start.clone())
        optimizer = kind([parameter], 1e-2, **options)
        for _ in range(20):
            parameter.grad = 2 * (parameter.detach() - target)
            optimizer.step()
        results.append(parameter.detach())
    moved = (results[0] - start).square().mean().sqrt()
    assert 0 < (results[1] - results[0]).square().mean().sqrt() < 0.02 * moved
