"""Activations by name, against their formulas."""

import math

import pytest
import torch

from sana.models.layers.activations import build_activation

X = torch.linspace(-4, 4, 33)
FORMULAS = {
    None: X,
    "relu": X.clamp(min=0),
    "silu": X / (1 + torch.exp(-X)),
    "swish": X / (1 + torch.exp(-X)),
    "gelu": 0.5 * X * (1 + torch.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
    "hswish": X * (X + 3).clamp(0, 6) / 6,
    "tanh": torch.tanh(X),
}


@pytest.mark.parametrize("name", list(FORMULAS))
def test_equals_the_formula(name: str | None) -> None:
    torch.testing.assert_close(build_activation(name)(X), FORMULAS[name])


def test_an_unknown_name_suggests_one() -> None:
    with pytest.raises(ValueError, match=r"'sillu'.*Did you mean 'silu'"):
        build_activation("sillu")
