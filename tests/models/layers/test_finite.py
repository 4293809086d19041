"""The first layer with a value that is not finite, for several causes."""

import torch
from torch import nn

from sana.models.layers.finite import first_nonfinite_layer


class Reciprocal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 / x


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Reciprocal()), nn.Linear(3, 1))


def test_names_the_innermost_layer_at_fault() -> None:
    network = model()
    nn.init.constant_(network[0].bias, -100.0)  # the ReLU then gives 0, its reciprocal infinity
    assert first_nonfinite_layer(network, torch.randn(2, 3)) == "1.1"


def test_names_a_broken_weight() -> None:
    network = model()
    network[2].weight.data[0, 1] = float("nan")
    nn.init.constant_(network[0].bias, 100.0)
    assert first_nonfinite_layer(network, torch.randn(2, 3)) == "2.weight"


def test_tells_bad_inputs_from_bad_layers() -> None:
    assert first_nonfinite_layer(model(), torch.tensor([[1.0, float("inf"), 0.0]])) == "inputs"


def test_a_sound_model_gives_none_and_keeps_no_hooks() -> None:
    network = model()
    nn.init.constant_(network[0].bias, 100.0)
    assert first_nonfinite_layer(network, torch.randn(2, 3)) is None
    assert all(not module._forward_hooks for module in network.modules())
