"""From weights in a file to a quantised network, layer by layer: the exact network never lies in memory as a whole.

Weights that were stored quantised are taken as they are; exact ones are quantised on the way. Files are read elsewhere.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.checkpoint import CheckpointError
from sana.models.diffusers_keys import EXTRA_KEYS
from sana.models.quantization.apply import (
    LARGE_LAYERS,
    Quantization,
    choose_layers,
    empty_layers,
    label,
    open_feed_forward,
    quantization_of,
    replace_module,
    weight_key,
)
from sana.models.quantization.kernels import require
from sana.models.quantization.layers import matches, plain_name, table_of
from sana.models.quantization.linear import QuantizedLinear
from sana.models.quantization.schemes import SCHEMES
from sana.models.weights import IGNORABLE, check_architecture


@dataclass(frozen=True)
class Wanted:
    """What `quantize` was asked for before there were weights: a scheme, and patterns of layers to keep."""

    scheme: str
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a network is to be.

    Attributes:
        dtype: of what stays exact, and of weights before they are quantised.
        device: where it goes, layer by layer.
        runs_on: where it computes; another device under offload.
        wanted: what exact weights become. Of quantised ones it has to be what they are.
    """

    dtype: torch.dtype
    device: torch.device
    runs_on: torch.device
    wanted: Wanted | None = None


@dataclass(frozen=True)
class Source:
    """Exact or quantised weights that were found.

    Attributes:
        name: for messages.
        tensors: key -> tensor, in the stored dtype, perhaps memory-mapped; emptied while they are taken.
        stored: how they are quantised; None for exact ones.
        optional: keys that may be absent or of another shape; the network's own are zero then.
    """

    name: str
    tensors: MutableMapping[str, Tensor]
    stored: Quantization | None = None
    optional: tuple[str, ...] = field(default=())


def fill_transformer(
    network: nn.Module,
    stored: MutableMapping[str, Tensor],
    *,
    name: str,
    record: Mapping[str, Any],
    target: Target,
) -> nn.Module:
    """Gives an empty transformer its weights, quantised; see `fill`.

    Args:
        network: on the meta device, exact.
        stored: official keys (or those of a quantised file) -> tensors; emptied.
        name: of the weights, for messages.
        record: what the file says of its quantised weights; empty for exact ones.
        target: what it is to be.

    Returns:
        The network, in evaluation mode and without gradients.
    """
    quantization = from_record(record, name) if record else None
    # Tables that only training reads; a file in diffusers' layout has no place for them.
    optional = tuple(key for key in (*IGNORABLE, *EXTRA_KEYS) if key in IGNORABLE or key not in stored)
    source = Source(name, stored, quantization, optional)
    fill(network, "transformer", source, target)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def fill(network: nn.Module, kind: str, source: Source, target: Target) -> None:
    """Gives an empty network its weights, those of large layers quantised.

    Args:
        network: on the meta device, exact; tables that no file holds may be real.
        kind: "transformer" or "text_encoder".
        source: where weights come from.
        target: what it is to be.

    Raises:
        CheckpointError: keys, shapes or dtypes do not fit, or the weights are quantised in another way.
        ValueError: see `quantize`.
        QuantizationUnavailableError: see `quantize`.
    """
    wanted = target.wanted
    if source.stored is not None:
        require(source.stored.scheme, target.runs_on)
        _check_wanted(network, kind, source, wanted)
        _check_layers(network, kind, source.stored, source.name)
        empty_layers(network, source.stored)
        _check(network, source)
    else:
        assert wanted is not None, "an exact file is quantised here, or loaded elsewhere"
        require(wanted.scheme, target.runs_on)
        chosen = choose_layers(network, kind, wanted.scheme, wanted.keep)
        _check(network, source)
        _quantize_layers(network, Quantization(wanted.scheme, chosen), source, target)
    _assign_rest(network, source, target.dtype, target.device)


def to_record(network: nn.Module, kind: str) -> dict[str, Any]:
    """Returns what a file says of the quantised weights in it: scheme, quantised layers, and those kept by choice.

    Raises:
        ValueError: the network is exact.
    """
    found = quantization_of(network)
    if found is None:
        raise ValueError(f"The {label(kind)} is not quantised.")
    quantized = table_of(kind).quantized
    exact = (plain_name(path) for path, module in network.named_modules() if isinstance(module, LARGE_LAYERS))
    kept = [name for name in exact if matches(name, quantized)]
    return {"scheme": found.scheme, "layers": list(found.layers), "keep": kept}


def from_record(record: Mapping[str, Any], source: str) -> Quantization:
    """Reads `to_record` back.

    Raises:
        CheckpointError: it is broken, or its scheme is unknown.
    """
    scheme, layers = record.get("scheme"), record.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise CheckpointError(f"{source} does not say which of its layers are quantised; make it anew.")
    if scheme not in SCHEMES:
        raise CheckpointError(f"{source} is quantised to {scheme!r}; this program knows {', '.join(SCHEMES)}.")
    return Quantization(str(scheme), tuple(layers))


def _check_wanted(network: nn.Module, kind: str, source: Source, wanted: Wanted | None) -> None:
    stored = source.stored
    assert stored is not None
    if wanted is None:
        return
    advice = "Take back the request, or load exact weights."
    if wanted.scheme != stored.scheme:
        raise CheckpointError(
            f"{source.name} holds {stored.scheme} weights, and quantize() asked for {wanted.scheme}. {advice}"
        )
    differing = sorted(set(choose_layers(network, kind, wanted.scheme, wanted.keep)) ^ set(stored.layers))
    if differing:
        place = "in the file only" if differing[0] in stored.layers else "by the request only"
        raise CheckpointError(
            f"{source.name} and quantize() differ in {len(differing)} layers: {differing[0]} is quantised {place}. "
            f"{advice}"
        )


def _check_layers(network: nn.Module, kind: str, stored: Quantization, name: str) -> None:
    """Checks that the layers a file calls quantised are large layers of the network."""
    known = {plain_name(path) for path, module in network.named_modules() if isinstance(module, LARGE_LAYERS)}
    for layer in stored.layers:
        if layer not in known:
            raise CheckpointError(
                f"{name} is quantised in {layer}, which the {label(kind)} does not have: they do not fit."
            )


def _check(network: nn.Module, source: Source) -> None:
    """Compares keys, shapes and kinds of dtype of a source with those of the network."""
    own = network.state_dict()
    check_architecture(type(network).__name__, own, source.tensors, source.optional, source.name)
    for key, target in own.items():
        found = source.tensors.get(key)
        if found is None:
            continue
        fits = found.dtype == target.dtype if _is_stored(network, key) else found.is_floating_point()
        if not fits:
            raise CheckpointError(f"{source.name} is damaged: {key} is {found.dtype} where {target.dtype} is expected.")


def _is_stored(network: nn.Module, key: str) -> bool:
    owner, _, leaf = key.rpartition(".")
    module = network.get_submodule(owner)
    return isinstance(module, QuantizedLinear) and leaf in module.stored


def _quantize_layers(network: nn.Module, chosen: Quantization, source: Source, target: Target) -> None:
    """Takes the weights of the chosen layers out of the source, and puts them quantised into the network."""
    keys = {layer: weight_key(network, layer) for layer in chosen.layers}
    open_feed_forward(network, chosen.layers)
    for layer, key in keys.items():
        weight = source.tensors.pop(key).to(target.dtype)
        bias = source.tensors.pop(f"{key.removesuffix('weight')}bias", None)
        bias = None if bias is None else _owned(bias, target.dtype, torch.device("cpu"))
        made = QuantizedLinear.from_weight(chosen.scheme, weight, bias, target.runs_on)
        replace_module(network, layer, made.to(target.device))


def _assign_rest(network: nn.Module, source: Source, dtype: torch.dtype, device: torch.device) -> None:
    """Gives every tensor that has no values yet those of the source, and moves what has."""
    for module_name, module in network.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for table in (module._parameters, module._buffers):
            for name, own in table.items():
                if own is None:
                    continue
                found = source.tensors.pop(f"{prefix}{name}", None)
                if found is not None and found.shape == own.shape:
                    exact = not (isinstance(module, QuantizedLinear) and name in module.stored)
                    value = _owned(found, dtype if exact else found.dtype, device)
                elif own.is_meta:  # the source may lack it: nothing that samples reads it
                    value = torch.zeros(own.shape, dtype=dtype, device=device)
                else:
                    value = own.to(device)
                is_parameter = table is module._parameters
                table[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value


def _owned(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor in memory of its own: one that is memory-mapped must not outlive its file, nor be written to."""
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
