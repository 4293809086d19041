"""The networks of a configuration as shapes: built without storage, and the bytes that their weights take."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.config import ConfigError, SanaConfig
from sana.models import build_transformer
from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS
from sana.models.autoencoder.loading import CONFIG_FILE, parse_config
from sana.models.layers.linear import Linear
from sana.models.metadata import fp16_lineage
from sana.models.quantization.layers import is_quantized
from sana.models.quantization.schemes import quantized_bytes
from sana.ops.packing import pack_budget
from sana.utils.dtype import parse_dtype

NETWORKS = ("text_encoder", "transformer", "autoencoder")
PACKED_DTYPES = (torch.float32, torch.bfloat16)  # what oneDNN keeps copies for


@dataclass(frozen=True)
class NetworkWeights:
    """Bytes that a network's weights take.

    Attributes:
        total: weights as they are held, quantised where they are.
        packed: the CPU's own copies of weights, made at the first use.
        unit: the largest unit that is moved at a time: a block, a layer of the text encoder, a stage of the autoencoder.
        rest: what belongs to no unit.
        units: number of units.
    """

    total: int
    packed: int = 0
    unit: int = 0
    rest: int = 0
    units: int = 0


def empty_transformer(config: SanaConfig) -> nn.Module:
    """Builds the transformer of a config without storage, on the meta device."""
    clip_fp16, _ = fp16_lineage(config.model.load_from or "", None, config.model.mixed_precision)
    with torch.device("meta"):
        return build_transformer(config, clip_fp16=clip_fp16).eval().requires_grad_(False)


def empty_autoencoder(config: SanaConfig) -> Autoencoder:
    """Builds the autoencoder of `config.vae` without storage, on the meta device.

    Raises:
        ConfigError: its shape is not known without its files.
    """
    reference = str(config.vae.vae_pretrained)
    folder = Path(reference).expanduser()
    found = next((one for one in (folder / "vae", folder) if (one / CONFIG_FILE).is_file()), None)
    name = reference.rstrip("/").rpartition("/")[2].removesuffix("-diffusers").removesuffix("_diffusers")
    if found is not None:
        import json

        shape = parse_config(json.loads((found / CONFIG_FILE).read_text(encoding="utf-8")))
    elif name in DCAE_PRESETS:
        shape = DCAE_PRESETS[name]
    else:
        raise ConfigError(
            f"The shape of the autoencoder vae.vae_pretrained {reference!r} is not known without its files: give a "
            f"local folder, or one of {', '.join(DCAE_PRESETS)}."
        )
    with torch.device("meta"):
        return DCAE(shape).eval().requires_grad_(False)


def empty_text_encoder(config: SanaConfig) -> nn.Module:
    """Builds the text encoder of `config.text_encoder` without storage, on the meta device."""
    from sana.models.text_encoder.architectures import empty_text_encoder as build

    return build(config.text_encoder.text_encoder_name)


BUILDERS: dict[str, Callable[[SanaConfig], nn.Module]] = {
    "text_encoder": empty_text_encoder,
    "transformer": empty_transformer,
    "autoencoder": empty_autoencoder,
}


def give_storage(network: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Replaces a meta network's tensors by empty ones of the mode that is on, in place; floating ones take the dtype."""

    def made(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)

    same: dict[int, Tensor] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = same.setdefault(id(parameter), made(parameter))
                module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = same.setdefault(id(buffer), made(buffer))


def named_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def weight_bytes(network: str, name: str, tensor: Tensor, dtype: torch.dtype, scheme: str | None) -> int:
    """Bytes of one weight of a network, as it is held."""
    if scheme is not None and tensor.dim() > 1 and name.endswith("weight") and is_quantized(network, name):
        return quantized_bytes(tuple(tensor.shape), scheme, dtype)
    return math.prod(tensor.shape) * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize


def unit_prefixes(network: str, module: nn.Module) -> tuple[str, ...]:
    """Names of the units of a network that are moved at a time, as prefixes of their weights' names."""
    lists = {"transformer": ("blocks", "controlnet"), "autoencoder": ("encoder.stages", "decoder.stages")}
    if network == "text_encoder":
        found = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
        names = tuple(name for name in found if name in ("layers", "encoder.block"))
    else:
        names = lists[network]
    children = dict(module.named_modules())
    return tuple(
        f"{name}.{index}."
        for name in names
        if name in children
        for index in range(len(list(children[name].children())))
    )


def measure_weights(
    network: str, module: nn.Module, dtype: torch.dtype, scheme: str | None, *, block: int, packed: int
) -> NetworkWeights:
    """Counts a network's weights.

    Args:
        network: one of NETWORKS.
        module: it, with or without storage.
        dtype: of weights that are not quantised.
        scheme: of quantisation, or None.
        block: every tensor is rounded up to a multiple of so many bytes.
        packed: bytes of the CPU's copies.
    """
    prefixes = unit_prefixes(network, module)
    units = dict.fromkeys(prefixes, 0)
    total = rest = 0
    for name, tensor in named_weights(module):
        size = -(-weight_bytes(network, name, tensor, dtype, scheme) // block) * block
        total += size
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            rest += size
        else:
            units[prefix] += size
    return NetworkWeights(total, packed, max(units.values(), default=0), rest, len(units))


def packed_bytes(network: str, module: nn.Module, dtype: torch.dtype, scheme: str | None, budget: int) -> int:
    """Bytes of the copies that oneDNN's products keep of a network's weights, see `sana.ops.packing.pack`."""
    if dtype not in PACKED_DTYPES or network == "text_encoder":
        return 0
    used = 0
    for name, weight in packable_weights(network, module):
        size = math.prod(weight.shape) * dtype.itemsize
        if scheme is not None and is_quantized(network, name):
            continue
        if used + size <= budget:
            used += size
    return used


def packable_weights(network: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that `linear_cpu` and `mix_ffn_cpu` compute with."""
    for name, child in module.named_modules():
        if isinstance(child, Linear):
            yield name, child.weight
        elif type(child) is nn.Conv2d:
            pointwise = child.kernel_size == (1, 1) and child.groups == 1 and child.stride == (1, 1)
            if pointwise or name.endswith(("mlp.depth_conv.conv", "main.depth_conv.conv")):
                yield name, child.weight


def scheme_for(network: str, transformer: str | None, text_encoder: str | None) -> str | None:
    """The quantisation of a network."""
    return {"transformer": transformer, "text_encoder": text_encoder}.get(network)


def network_dtype(network: str, config: SanaConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a network's weights in a pipeline of a dtype: the autoencoder keeps its own."""
    return parse_dtype(config.vae.weight_dtype) if network == "autoencoder" else dtype


def left_budget(packed: Any = 0) -> int:
    """Bytes that further packed copies may take."""
    return max(0, pack_budget() - int(packed))
