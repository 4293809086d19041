"""State-dict keys of the transformer: official names <-> diffusers' `SanaTransformer2DModel`. No files, no configs.

diffusers splits the fused `qkv` and `kv` projections and has no place for `EXTRA_KEYS`; `pos_embed` is a fixed table
that both sides compute.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

EXTRA_KEYS = ("y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
FIXED_KEYS = ("pos_embed",)

_TOP = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
    "final_layer": "",  # its scale_shift_table stands at the top
}
_TOP_GUIDANCE = {  # Sprint: a second embedder beside the one of time
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
}
_BLOCK = {
    "": ("",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.q_norm": ("attn2.norm_q",),
    "cross_attn.k_norm": ("attn2.norm_k",),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
_OFFICIAL_BLOCK = re.compile(r"^blocks\.(\d+)\.(?:(.+)\.)?([a-z_]+)$")


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether the keys are those of a diffusers Sana transformer."""
    return any(key.startswith(("transformer_blocks.", "patch_embed.proj.")) for key in keys)


def diffusers_names(key: str, guidance_embeds: bool = False) -> tuple[str, ...] | None:
    """The diffusers keys that hold an official tensor, in order of its equal parts along dimension 0.

    Args:
        key: official key, such as "blocks.3.attn.qkv.weight".
        guidance_embeds: whether the model has `cfg_embedder` (Sprint): diffusers' time embedder has other names then.

    Returns:
        One, two (kv) or three (qkv) keys; None when diffusers has no place for the tensor.
    """
    block = _OFFICIAL_BLOCK.match(key)
    if block:
        index, module, leaf = block[1], block[2] or "", block[3]
        names = _BLOCK.get(module)
        if names is None:
            return None
        return tuple(".".join(part for part in ("transformer_blocks", index, name, leaf) if part) for name in names)
    module, _, leaf = key.rpartition(".")
    table = _TOP | _TOP_GUIDANCE if guidance_embeds else _TOP
    if module not in table:
        return None
    return (".".join(part for part in (table[module], leaf) if part),)


def to_diffusers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Splits an official state dict into what diffusers keeps, the rest that must travel apart, and strangers.

    Args:
        state: official keys.

    Returns:
        (diffusers state dict, extra tensors under official keys, keys that neither has a place for). `pos_embed` is
        in none of them.
    """
    guidance_embeds = "cfg_embedder.mlp.0.weight" in state
    kept: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    strangers: list[str] = []
    for key, tensor in state.items():
        if key in FIXED_KEYS:
            continue
        if key in EXTRA_KEYS:
            extra[key] = tensor
            continue
        names = diffusers_names(key, guidance_embeds)
        if names is None:
            strangers.append(key)
            continue
        for name, part in zip(names, tensor.chunk(len(names), dim=0), strict=True):
            kept[name] = part.contiguous()
    return kept, extra, strangers


def from_diffusers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Joins a diffusers state dict into official tensors.

    Args:
        state: keys of `SanaTransformer2DModel`; official `EXTRA_KEYS` among them pass unchanged.

    Returns:
        (official state dict, keys that have no official counterpart or lack a sibling such as to_q without to_k).
    """
    guidance_embeds = any(key.startswith("time_embed.guidance_embedder.") for key in state)
    joined: dict[str, Tensor] = {}
    used: set[str] = set()
    for key in official_keys(state, guidance_embeds):
        names = diffusers_names(key, guidance_embeds)
        if names is None or any(name not in state for name in names):
            continue
        parts = [state[name] for name in names]
        joined[key] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)
        used.update(names)
    for key in EXTRA_KEYS:
        if key in state:
            joined[key] = state[key]
            used.add(key)
    return joined, sorted(set(state) - used)


def official_keys(diffusers_keys: Iterable[str], guidance_embeds: bool) -> list[str]:
    """Every official key that could be made of the given diffusers keys."""
    keys = list(diffusers_keys)
    depth = 1 + max((int(key.split(".")[1]) for key in keys if key.startswith("transformer_blocks.")), default=-1)
    table = _TOP | _TOP_GUIDANCE if guidance_embeds else _TOP
    leaves = ("weight", "bias", "scale_shift_table")
    found = [f"{module}.{leaf}" for module in table for leaf in leaves]
    for index in range(depth):
        found += [
            ".".join(p for p in ("blocks", str(index), module, leaf) if p) for module in _BLOCK for leaf in leaves
        ]
    return found
