"""DC-AE in diffusers' words: its `AutoencoderDC` config and state-dict keys, to and from ours. Reads no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.dc_ae_blocks import attention_scales

DOWNSAMPLE = {"Conv": "conv", "ConvPixelUnshuffle": "pixel_unshuffle"}
UPSAMPLE = {"InterpolateConv": "interpolate", "ConvPixelShuffle": "pixel_shuffle"}
NORM = {"trms2d": "rms_norm", "rms2d": "rms_norm", "bn2d": "batch_norm"}
FROM_DOWNSAMPLE = {"conv": "Conv", "pixel_unshuffle": "ConvPixelUnshuffle"}
FROM_UPSAMPLE = {"interpolate": "InterpolateConv", "pixel_shuffle": "ConvPixelShuffle"}
FROM_NORM = {"rms_norm": "trms2d", "batch_norm": "bn2d"}

# What diffusers' class assumes when config.json does not say.
DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": None,
}

# Our key (one block, without its place) -> diffusers' key.
_BLOCK_RULES = (
    (r"main\.conv1\.conv\.(.*)", r"conv1.\1"),
    (r"main\.conv2\.conv\.(.*)", r"conv2.\1"),
    (r"main\.conv2\.norm\.(.*)", r"norm.\1"),
    (r"main\.conv\.(?:conv\.)?(weight|bias)", r"conv.\1"),
    (r"context_module\.main\.aggreg\.(\d+)\.0\.(.*)", r"attn.to_qkv_multiscale.\1.proj_in.\2"),
    (r"context_module\.main\.aggreg\.(\d+)\.1\.(.*)", r"attn.to_qkv_multiscale.\1.proj_out.\2"),
    (r"context_module\.main\.proj\.conv\.(.*)", r"attn.to_out.\1"),
    (r"context_module\.main\.proj\.norm\.(.*)", r"attn.norm_out.\1"),
    (r"context_module\.main\.qkv\.conv\.(.*)", r"attn.to_qkv.\1"),
    (r"local_module\.main\.inverted_conv\.conv\.(.*)", r"conv_out.conv_inverted.\1"),
    (r"local_module\.main\.depth_conv\.conv\.(.*)", r"conv_out.conv_depth.\1"),
    (r"local_module\.main\.point_conv\.conv\.(.*)", r"conv_out.conv_point.\1"),
    (r"local_module\.main\.point_conv\.norm\.(.*)", r"conv_out.norm.\1"),
)
_STAGE = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.*)")


def config_from_diffusers(raw: Mapping[str, Any]) -> DCAEConfig:
    """The shape that a diffusers `AutoencoderDC` config.json describes.

    Args:
        raw: the parsed file; missing keys take diffusers' defaults, keys that start with "_" are ignored.

    Raises:
        ValueError: an unknown key, or a value that this network does not have.
    """
    unknown = [key for key in raw if key not in DIFFUSERS_DEFAULTS and not key.startswith("_")]
    if unknown:
        raise ValueError(f"unknown keys in the AutoencoderDC config: {', '.join(unknown)}")
    values = {key: raw.get(key, default) for key, default in DIFFUSERS_DEFAULTS.items()}
    decoder = {name: _per_stage(values, "decoder", name) for name in ("norm_types", "act_fns")}
    for kind, norm, act in zip(_per_stage(values, "decoder", "block_types"), *decoder.values(), strict=True):
        if kind == "EfficientViTBlock" and (norm, act) != ("rms_norm", "silu"):
            raise ValueError(f"a decoder stage of EfficientViTBlock needs rms_norm and silu, got {norm} and {act}")
    return DCAEConfig(
        latent_channels=values["latent_channels"],
        in_channels=values["in_channels"],
        head_dim=values["attention_head_dim"],
        encoder_width_list=tuple(values["encoder_block_out_channels"]),
        encoder_depth_list=tuple(values["encoder_layers_per_block"]),
        encoder_block_type=_block_types(values, "encoder"),
        downsample_block_type=_translate(FROM_DOWNSAMPLE, values, "downsample_block_type"),
        encoder_out_shortcut=values["encoder_out_shortcut"],
        decoder_width_list=tuple(values["decoder_block_out_channels"]),
        decoder_depth_list=tuple(values["decoder_layers_per_block"]),
        decoder_block_type=_block_types(values, "decoder"),
        decoder_norm=tuple(
            _translate(FROM_NORM, {"decoder_norm_types": n}, "decoder_norm_types") for n in decoder["norm_types"]
        ),
        decoder_act=decoder["act_fns"],
        upsample_block_type=_translate(FROM_UPSAMPLE, values, "upsample_block_type"),
        decoder_in_shortcut=values["decoder_in_shortcut"],
        decoder_out_act=values["decoder_conv_act_fn"],
        scaling_factor=values["scaling_factor"],
    )


def config_to_diffusers(config: DCAEConfig) -> dict[str, Any]:
    """The config.json of diffusers' `AutoencoderDC` for this shape.

    Raises:
        ValueError: diffusers has no such network (an encoder without RMS norm or SiLU, ...).
    """
    fixed = {
        "encoder_norm": (config.encoder_norm, {"trms2d", "rms2d"}),
        "encoder_act": (config.encoder_act, {"silu"}),
        "decoder_out_norm": ((config.decoder_out_norm,), {"trms2d", "rms2d"}),
    }
    for name, (given, allowed) in fixed.items():
        if not set(given) <= allowed:
            raise ValueError(f"diffusers' AutoencoderDC has no {name} {given}: it always uses {sorted(allowed)}")
    raw: dict[str, Any] = {"_class_name": "AutoencoderDC"}
    for side in ("encoder", "decoder"):
        kinds = getattr(config, f"{side}_block_type")
        residual = [kind == "ResBlock" for kind in kinds]
        raw[f"{side}_block_types"] = ["ResBlock" if plain else "EfficientViTBlock" for plain in residual]
        raw[f"{side}_qkv_multiscales"] = [
            [] if plain else list(attention_scales(kind)) for plain, kind in zip(residual, kinds, strict=True)
        ]
        raw[f"{side}_block_out_channels"] = list(getattr(config, f"{side}_width_list"))
        raw[f"{side}_layers_per_block"] = list(getattr(config, f"{side}_depth_list"))
    return raw | {
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "downsample_block_type": DOWNSAMPLE[config.downsample_block_type],
        "upsample_block_type": UPSAMPLE[config.upsample_block_type],
        "decoder_norm_types": [NORM[name] for name in config.decoder_norm],
        "decoder_act_fns": list(config.decoder_act),
        "encoder_out_shortcut": config.encoder_out_shortcut,
        "decoder_in_shortcut": config.decoder_in_shortcut,
        "decoder_conv_act_fn": config.decoder_out_act,
        "scaling_factor": config.scaling_factor,
    }


def diffusers_names(keys: Iterable[str]) -> dict[str, str]:
    """Our keys, all of one network, -> diffusers' keys; the fused `qkv` becomes `to_qkv`, which diffusers splits.

    Raises:
        ValueError: a key is not one of a DC-AE.
    """
    names = {key: _name(key) for key in keys}
    if not any(key.startswith("encoder.stages.0.") for key in names):  # then diffusers wraps the first convolution
        for key, name in names.items():
            if name in ("encoder.conv_in.weight", "encoder.conv_in.bias"):
                names[key] = name.replace("conv_in.", "conv_in.conv.")
    return names


def _name(key: str) -> str:
    stage = _STAGE.fullmatch(key)
    if stage:
        side, i, j, rest = stage.groups()
        for pattern, replacement in _BLOCK_RULES:
            if match := re.fullmatch(pattern, rest):
                blocks = "down_blocks" if side == "encoder" else "up_blocks"
                return f"{side}.{blocks}.{i}.{j}.{match.expand(replacement)}"
    elif match := re.fullmatch(r"(encoder|decoder)\.project_(in|out)\.(?:main\.)?(?:op_list\.\d\.)?(.*)", key):
        side, end, rest = match.groups()
        if side == "decoder" and end == "out" and not rest.startswith("conv."):
            return f"decoder.norm_out.{rest}"
        return f"{side}.conv_{end}.{rest.removeprefix('conv.')}"  # a resampling layer keeps its own "conv."
    raise ValueError(f"{key!r} is no key of a DC-AE")


def to_diffusers_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole state dict under diffusers' keys; exact, every tensor is kept (1x1 convolutions become linear)."""
    converted: dict[str, Tensor] = {}
    for key, name in diffusers_names(state).items():
        if name.endswith(".attn.to_qkv.weight"):
            for letter, part in zip("qkv", state[key].flatten(1).chunk(3), strict=True):
                converted[name.replace("to_qkv", f"to_{letter}")] = part.contiguous()
        else:
            converted[name] = state[key].flatten(1) if name.endswith(".attn.to_out.weight") else state[key]
    return converted


def from_diffusers_state_dict(state: Mapping[str, Tensor], config: DCAEConfig) -> dict[str, Tensor]:
    """Diffusers' state dict under our keys; keys that the config does not have keep their name, for a strict load.

    Raises:
        ValueError: a tensor that the config needs is missing.
    """
    with torch.device("meta"):
        names = diffusers_names(DCAE(config).state_dict())
    rest, converted, missing = dict(state), {}, []
    for key, name in names.items():
        fused = name.endswith(".attn.to_qkv.weight")
        sources = [name.replace("to_qkv", f"to_{letter}") for letter in "qkv"] if fused else [name]
        if not all(source in rest for source in sources):
            missing += [source for source in sources if source not in rest]
            continue
        parts = [rest.pop(source) for source in sources]
        tensor = torch.cat(parts) if fused else parts[0]
        linear = fused or name.endswith(".attn.to_out.weight")
        converted[key] = tensor[:, :, None, None] if linear else tensor
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(f"the AutoencoderDC weights lack {len(missing)} tensors that its config needs: {shown}")
    return converted | rest


def _per_stage(values: Mapping[str, Any], side: str, name: str) -> tuple[str, ...]:
    value = values[f"{side}_{name}"]
    return (value,) * len(values[f"{side}_block_out_channels"]) if isinstance(value, str) else tuple(value)


def _block_types(values: Mapping[str, Any], side: str) -> tuple[str, ...]:
    names = []
    for kind, scales in zip(_per_stage(values, side, "block_types"), values[f"{side}_qkv_multiscales"], strict=True):
        if kind not in ("ResBlock", "EfficientViTBlock"):
            raise ValueError(f"{side}_block_types: unknown {kind!r}; allowed are ResBlock and EfficientViTBlock")
        names.append(kind if kind == "ResBlock" else f"EViT{''.join(f'S{k}' for k in scales)}_GLU")
    return tuple(names)


def _translate(table: Mapping[str, str], values: Mapping[str, Any], key: str) -> str:
    if values[key] not in table:
        raise ValueError(f"{key}: unknown {values[key]!r}; allowed are {', '.join(table)}")
    return table[values[key]]
