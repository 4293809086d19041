"""Noise that does not depend on the batch."""

import random

import numpy as np
import pytest
import torch

from sana.utils.seed import make_generators, randn, seed_everything


def test_rows_of_a_batch_are_the_single_draws() -> None:
    batch = randn((3, 4, 5, 6), make_generators(7, 3))
    for index in range(3):
        single = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(7 + index))
        assert torch.equal(batch[index : index + 1], single)


def test_one_generator_draws_as_torch_does() -> None:
    noise = randn((2, 3), torch.Generator().manual_seed(5))
    assert torch.equal(noise, torch.randn(2, 3, generator=torch.Generator().manual_seed(5)))


def test_sixteen_bit_noise_is_the_rounded_fp32_noise() -> None:
    full = randn((2, 64), torch.Generator().manual_seed(5))
    half = randn((2, 64), torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())


def test_wrong_number_of_generators() -> None:
    with pytest.raises(ValueError, match="2 generators were given for 3 images"):
        randn((3, 1), make_generators(0, 2))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\)"):
        make_generators(seed, 1)


def test_seed_everything() -> None:
    def draw() -> tuple[float, float, float]:
        seed_everything(2**40 + 1)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
