"""`quantize`: replacing the large linear layers of a loaded network, and saying which they were.

Which layers they are is in `layers.py`, what they become in `linear.py`; `load.py` quantises while a file is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.quantization.kernels import require
from sana.models.quantization.layers import matches, plain_name, table_of
from sana.models.quantization.linear import QuantizedLinear, QuantizedMixFFN
from sana.models.quantization.schemes import SCHEMES, check_shape, scheme_of
from sana.models.text_encoder.base import TextEncoder
from sana.models.transformer.mix_ffn import MixFFN

LARGE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Quantization:
    """How a network is quantised.

    Attributes:
        scheme: its name.
        layers: names of the quantised layers, in the network's order.
    """

    scheme: str
    layers: tuple[str, ...]


@torch.no_grad()
def quantize(
    model: nn.Module, scheme: str, *, keep: Sequence[str] = (), device: torch.device | None = None
) -> tuple[str, ...]:
    """Replaces, in place, the large linear layers of a network by quantised ones; all of them or none.

    Layers are quantised one by one on the CPU (int4: on the GPU), so that little more memory is needed than before, and
    the bits do not depend on the machine. Weights are quantised as they are, in the dtype they were loaded in.

    Args:
        model: a Sana transformer or a `TextEncoder`, with weights, in evaluation mode.
        scheme: "int8" (weights only), "int8-dynamic" (weights and inputs), "int4" (CUDA), "nf4" (bitsandbytes) or "fp8"
            (Hopper); see `SCHEMES`.
        keep: patterns (`fnmatch`) of layers that stay exact beside those of `LAYERS`, for example "blocks.0.*".
        device: where it will run; None: where its weights lie.

    Returns:
        Names of the replaced layers: `blocks.0.attn.qkv`, or `layers.0.mlp.up_proj` within `TextEncoder.model`.

    Raises:
        ValueError: the scheme is unknown, a pattern of `keep` names no layer, the network has a layer that `LAYERS`
            does not know or a width that the scheme cannot store, it is quantised already, has no weights, or learns.
        QuantizationUnavailableError: the device or the package is missing.
    """
    network, chosen = check_quantizable(model, scheme, keep=keep, device=device)
    open_feed_forward(network, chosen)
    for name in chosen:
        layer = network.get_submodule(name)
        replace_module(network, name, QuantizedLinear.from_weight(scheme, _weight(layer), _bias(layer), device))
        del layer  # the exact weight goes before the next one is quantised
    return chosen


def check_quantizable(
    model: nn.Module, scheme: str, *, keep: Sequence[str] = (), device: torch.device | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Makes all the checks of `quantize` and changes nothing; raises what it raises.

    Returns:
        The network whose layers would be replaced, and their names.
    """
    network, kind = network_of(model)
    scheme_of(scheme)
    check_patterns(keep)
    if (found := quantization_of(model)) is not None:
        raise ValueError(f"The {label(kind)} is quantised to {found.scheme} already, which cannot be undone.")
    _check_state(network, kind)
    require(scheme, device or next(network.parameters()).device)
    return network, choose_layers(network, kind, scheme, keep)


def network_of(model: nn.Module) -> tuple[nn.Module, str]:
    """Returns the network whose layers are quantised and its kind in `LAYERS`.

    Raises:
        ValueError: it is of no known kind.
    """
    if isinstance(model, TextEncoder):
        return model.model, "text_encoder"
    if isinstance(getattr(model, "blocks", None), nn.ModuleList):
        return model, "transformer"
    raise ValueError(
        f"A {type(model).__name__} is not quantised: it has no blocks of a Sana transformer, and is no TextEncoder."
    )


def choose_layers(network: nn.Module, kind: str, scheme: str, keep: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names of the layers that `quantize` replaces; weights may be on the meta device.

    Raises:
        ValueError: see `quantize`.
    """
    table, found = table_of(kind), {}
    for path, module in network.named_modules():
        if isinstance(module, LARGE_LAYERS):
            name = plain_name(path)
            owner = network.get_submodule(name.rpartition(".")[0])
            replaceable = isinstance(module, nn.Linear) or isinstance(owner, MixFFN)
            if matches(name, table.quantized) and replaceable:
                found[name] = module.weight.shape
            elif not matches(name, table.exact):
                raise ValueError(
                    f"Nothing says how {path} in a {type(owner).__name__} is quantised, or that it stays exact: "
                    f"that kind of layer is not known to {__name__.rpartition('.')[0]}.layers."
                )
    for pattern in keep:
        if not matches_any(pattern, found):
            raise ValueError(
                f"keep: no layer of the {label(kind)} that would be quantised is called {pattern!r}; names are such as "
                f"{', '.join(list(found)[:3])}."
            )
    chosen = {name: shape for name, shape in found.items() if not matches(name, keep)}
    if not chosen:
        raise ValueError(f"Nothing of the {label(kind)} is left to quantise.")
    for name, shape in chosen.items():
        try:
            check_shape(shape, SCHEMES[scheme])
        except ValueError as error:
            raise ValueError(f"{name}: {error} Keep that layer exact, or use another scheme.") from error
    return tuple(chosen)


def check_patterns(keep: Sequence[str]) -> None:
    """Raises ValueError for a text in the place of a list: its letters would be taken for patterns."""
    if isinstance(keep, str):
        raise ValueError(f"keep must be a list of patterns, not the text {keep!r}.")


def matches_any(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern names one of the layers."""
    return any(matches(name, (pattern,)) for name in names)


def label(kind: str) -> str:
    """Returns a network's kind in words."""
    return kind.replace("_", " ")


def quantization_of(model: nn.Module) -> Quantization | None:
    """Returns how a network is quantised; None where it is exact."""
    network = model.model if isinstance(model, TextEncoder) else model
    layers = {name: one.scheme for name, one in network.named_modules() if isinstance(one, QuantizedLinear)}
    return Quantization(next(iter(layers.values())), tuple(layers)) if layers else None


def open_feed_forward(network: nn.Module, layers: Iterable[str]) -> None:
    """Makes every Mix-FFN that holds one of the layers take any linear layer in their place."""
    for parent in {name.rpartition(".")[0] for name in layers}:
        owner = network.get_submodule(parent)
        if isinstance(owner, MixFFN):
            replace_module(network, parent, QuantizedMixFFN(owner))


def empty_layers(network: nn.Module, quantization: Quantization) -> None:
    """Puts quantised layers without values (on the meta device) in the place of exact ones."""
    open_feed_forward(network, quantization.layers)
    for name in quantization.layers:
        layer = network.get_submodule(name)
        replace_module(network, name, QuantizedLinear.empty(quantization.scheme, _weight(layer), _bias(layer)))


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another one; it is in evaluation mode."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module.eval())


def weight_key(network: nn.Module, layer: str, tensor: str = "weight") -> str:
    """Returns the key of an exact layer's weight or bias: a convolution of the Mix-FFN has one level more."""
    inner = ".conv" if hasattr(network.get_submodule(layer), "conv") else ""
    return f"{layer}{inner}.{tensor}"


def _check_state(network: nn.Module, kind: str) -> None:
    if any(one.is_meta for one in network.parameters()):
        raise ValueError(f"The {label(kind)} has no weights yet; load them first, then quantise.")
    if network.training or any(one.requires_grad for one in network.parameters()):
        raise ValueError(
            f"The {label(kind)} is set to learn, which quantised weights cannot: call .eval().requires_grad_(False)."
        )
    unusual = next((name for name, one in network.named_parameters() if not one.is_floating_point()), None)
    if unusual is not None:
        raise ValueError(f"The {label(kind)} holds {unusual}, which is no floating-point weight: it is packed already.")


def _weight(layer: nn.Module) -> Tensor:
    exact: Any = getattr(layer, "conv", layer)
    return exact.weight


def _bias(layer: nn.Module) -> Tensor | None:
    exact: Any = getattr(layer, "conv", layer)
    return exact.bias
