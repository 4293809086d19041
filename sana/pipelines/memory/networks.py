"""The networks of a configuration as shapes: built without storage, and the bytes that their weights take."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sana.config import ConfigError, SanaConfig
from sana.models import build_transformer
from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS
from sana.models.autoencoder.dc_ae_resample import InterpolateUpsample
from sana.models.autoencoder.loading import CONFIG_FILE, parse_config
from sana.models.layers.linear import Linear
from sana.models.metadata import fp16_lineage
from sana.pipelines.offload_units import TEXT_LAYERS, units_of
from sana.utils.dtype import parse_dtype

NETWORKS = ("text_encoder", "transformer", "autoencoder")
PACKED_DTYPES = (torch.float32, torch.bfloat16)  # see `sana.ops.packing.packable`
DEPTHWISE = ("mlp.depth_conv.conv", "local_module.main.depth_conv.conv")  # what `mix_ffn_cpu` packs besides products


@dataclass(frozen=True)
class NetworkWeights:
    """Bytes that a network's weights take.

    Attributes:
        total: weights as they are held, quantised where they are.
        packed: the CPU's own copies of weights, made at the first use; of the autoencoder, those of its decoder.
        unit: the largest unit that offload moves at a time, see `sana.pipelines.offload_units`: a block, a layer or the
            embedding of a text encoder, a stage of the autoencoder.
        rest: what stays on the device while the network is in use.
        units: number of units.
        pair: the largest two units that follow one another, which group offload holds together.
    """

    total: int
    packed: int = 0
    unit: int = 0
    rest: int = 0
    units: int = 0
    pair: int = 0


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
    found = next((one / CONFIG_FILE for one in (folder / "vae", folder) if (one / CONFIG_FILE).is_file()), None)
    name = reference.rstrip("/").rpartition("/")[2].removesuffix("-diffusers").removesuffix("_diffusers")
    raw = {"model_name": name} if found is None else json.loads(found.read_text(encoding="utf-8"))
    if raw.get("_class_name") == "AutoencoderKL":
        raise ConfigError(
            f"The memory of vae.vae_pretrained {reference!r} is not predicted: it is an AutoencoderKL, whose code is "
            "diffusers'. Choose a DC-AE, or measure a run."
        )
    if found is None and name not in DCAE_PRESETS:
        raise ConfigError(
            f"The shape of the autoencoder vae.vae_pretrained {reference!r} is not known without its files: give a "
            f"local folder, or one of {', '.join(DCAE_PRESETS)}."
        )
    with torch.device("meta"):
        return DCAE(parse_config(raw)).eval().requires_grad_(False)


def empty_text_encoder(config: SanaConfig) -> nn.Module:
    """Builds the network of `config.text_encoder` without storage, on the meta device."""
    from sana.models.text_encoder.architectures import empty_text_encoder as build

    return build(config.text_encoder.text_encoder_name)


BUILDERS: dict[str, Callable[[SanaConfig], nn.Module]] = {
    "text_encoder": empty_text_encoder,
    "transformer": empty_transformer,
    "autoencoder": empty_autoencoder,
}


def build_empty(network: str, config: SanaConfig, scheme: str | None = None) -> nn.Module:
    """Builds one of NETWORKS on the meta device, its large layers as a scheme of quantisation stores them.

    Raises:
        ConfigError: its shape is not known without its files.
        ValueError: the scheme is unknown, or cannot store a layer.
    """
    module = BUILDERS[network](config)
    if scheme is not None:
        from sana.models.quantization.apply import Quantization, choose_layers, empty_layers

        empty_layers(module, Quantization(scheme, choose_layers(module, network, scheme)))
    return module


def network_dtype(network: str, config: SanaConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a network's weights in a pipeline of a dtype: the autoencoder keeps its own."""
    return parse_dtype(config.vae.weight_dtype) if network == "autoencoder" else dtype


def give_storage(network: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Replaces a meta network's tensors by empty ones, in place: fake ones where a fake mode is on.

    Floating weights take the dtype; what quantised layers store keeps its own.
    """
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def replaced(tensor: Tensor, kind: torch.dtype) -> Any:
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
            learns = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if learns else new
        return made[id(tensor)]

    # All of the old tensors stay alive meanwhile, so that no two have one id.
    old = [(module, dict(module._parameters), dict(module._buffers)) for module in network.modules()]
    for module, parameters, buffers in old:
        for name, one in (parameters | buffers).items():
            if one is not None:
                exact = not one.is_floating_point() or name in getattr(module, "stored", ())
                table: dict[str, Any] = module._parameters if name in parameters else module._buffers
                table[name] = replaced(one, one.dtype if exact else dtype)


def use_empty_tables(transformer: Any) -> None:
    """Makes a transformer without weights take position tables of the right shape, which nobody keeps.

    Its own are kept for the whole process, and one without numbers would be served to a real network later.
    """
    arch, rotations = transformer.architecture, {}

    def position_embedding(grid: tuple[int, int]) -> Tensor | None:
        added = arch.use_pe and not arch.use_rope
        return torch.empty(1, grid[0] * grid[1], arch.hidden_size) if added else None

    def rotary(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        if arch.use_rope and grid not in rotations:
            shape = (grid[0] * grid[1], arch.head_dim)
            rotations[grid] = (torch.empty(shape, device=device), torch.empty(shape, device=device))
        return rotations.get(grid)

    transformer.position_embedding, transformer.rotary = position_embedding, rotary


def repeated(network: str, module: Any) -> list[list[nn.Module]]:
    """Returns the runs of blocks, or of a language model's layers, that may be alike."""
    if network == "autoencoder":
        return []
    if network == "transformer":
        return [list(module.blocks)]
    named = module.named_modules()
    return [
        list(one) for path, one in named if isinstance(one, nn.ModuleList) and path.rpartition(".")[2] in TEXT_LAYERS
    ]


def keep_folded(autoencoder: nn.Module) -> None:
    """Makes an autoencoder without weights keep the kernels that it folds, as one with weights does."""
    for module in autoencoder.modules():
        if isinstance(module, InterpolateUpsample):
            module._kernels = cache(module._kernels)  # type: ignore[method-assign]


def named_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def weights_of(network: str, module: nn.Module, *, block: int, packed: int) -> NetworkWeights:
    """Counts the weights of a network that has (fake) storage.

    Args:
        network: one of NETWORKS.
        module: it.
        block: every tensor is rounded up to a multiple of so many bytes.
        packed: bytes of the CPU's copies.
    """
    holder: Any = SimpleNamespace(model=module) if network == "text_encoder" else module
    cut, owners = units_of(network, holder), dict[int, int]()
    for index, unit in enumerate(cut.order):
        owners |= {id(tensor): index for name, tensor in named_weights(unit) if not name.endswith(cut.rest or ("//",))}
    units = [0] * len(cut.order)
    total = rest = 0
    for name, tensor in named_weights(module):
        size = -(-tensor.nbytes // block) * block
        total += size
        if id(tensor) in owners:
            units[owners[id(tensor)]] += size
        elif name not in cut.unread:
            rest += size
    pairs = [one + following for one, following in pairwise([*units, *units[:1]])]
    return NetworkWeights(total, packed, max(units, default=0), rest, len(units), max(pairs, default=0))


def packed_bytes(module: nn.Module, budget: int) -> int:
    """Bytes of the packed copies of a network's weights that are kept within a budget.

    They are asked for in the order of their layers, see `sana.ops.packing.pack`.
    """
    used = 0
    for weight in packable_weights(module):
        if used + weight.nbytes <= budget:
            used += weight.nbytes
    return used


def packable_weights(module: Any) -> Iterator[Tensor]:
    """The weights that `linear_cpu` and `mix_ffn_cpu` compute with."""
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if weight is None or weight.dtype not in PACKED_DTYPES:
            continue
        if isinstance(child, Linear):
            yield weight
        elif type(child) is nn.Conv2d:
            pointwise = child.kernel_size == (1, 1) and child.groups == 1 and child.stride == (1, 1)
            if pointwise or name.endswith(DEPTHWISE):
                yield weight
