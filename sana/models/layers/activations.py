"""Activation functions by their official names. Which one a layer uses is the layer's decision."""

from torch import nn

from sana.registry import suggest

_ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "hsigmoid": nn.Hardsigmoid,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "mish": nn.Mish,
    "identity": nn.Identity,
}


def build_activation(name: str | None) -> nn.Module:
    """Returns the activation module of that name; None is the identity.

    Raises:
        ValueError: the name is not known.
    """
    if name is None:
        return nn.Identity()
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise ValueError(f"Unknown activation {name!r}.{suggest(name, list(_ACTIVATIONS))} Known names: {known}.")
    return _ACTIVATIONS[name]()
