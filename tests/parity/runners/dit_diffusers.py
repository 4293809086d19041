"""Compares our network with diffusers' SanaTransformer2DModel: recorded outputs and a live run. Called by dit.py."""

import torch
from torch import Tensor

from sana.models.transformer.sana import SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from tests.parity.common import Case

FRACTION = 0.7
TOP_LEVEL = {
    "patch_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
    "time_embed.linear": "t_block.1",
}
TIME = {
    "time_embed.emb.timestep_embedder": "t_embedder",  # without guidance
    "time_embed.timestep_embedder": "t_embedder",
    "time_embed.guidance_embedder": "cfg_embedder",
}
IN_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
}
FUSED = {
    "attn1.to_q": ("attn.qkv", 0, 3),
    "attn1.to_k": ("attn.qkv", 1, 3),
    "attn1.to_v": ("attn.qkv", 2, 3),
    "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": ("cross_attn.kv_linear", 1, 2),
}


def official_tensor(key: str, official: dict[str, Tensor]) -> Tensor:
    """Returns the tensor that diffusers keeps under `key`, taken from an official state dict."""
    if key == "scale_shift_table":
        return official["final_layer.scale_shift_table"]
    stem, _, leaf = key.rpartition(".")
    if stem in TOP_LEVEL:
        return official[f"{TOP_LEVEL[stem]}.{leaf}"]
    embedder, _, layer = stem.rpartition(".")
    if embedder in TIME:
        return official[f"{TIME[embedder]}.mlp.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{leaf}"]
    _, index, inner = key.split(".", 2)
    if inner == "scale_shift_table":
        return official[f"blocks.{index}.{inner}"]
    inner = inner.removesuffix(f".{leaf}")
    if inner in FUSED:
        name, part, parts = FUSED[inner]
        return official[f"blocks.{index}.{name}.{leaf}"].chunk(parts)[part]
    return official[f"blocks.{index}.{IN_BLOCK[inner]}.{leaf}"]


def diffusers_network(arguments: dict, official: dict[str, Tensor]) -> tuple[torch.nn.Module, float]:
    """Returns diffusers' network with the official weights, and its timestep scale."""
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(**arguments).eval()
    converted = {key: official_tensor(key, official) for key in network.state_dict() if key != "patch_embed.pos_embed"}
    missing, unexpected = network.load_state_dict(converted, strict=False)
    assert not unexpected and set(missing) <= {"patch_embed.pos_embed"}, (missing, unexpected)
    return network, arguments.get("timestep_scale", 1.0)


@torch.no_grad()
def run_diffusers_crosscheck(case: Case) -> None:
    official = {name: value for name, value in case.constructor["official"].items() if name != "class"}
    sprint = "cfg_scale" in case.call
    ours = (SanaMSCM if sprint else SanaMS)(**official).eval()
    ours.load_state_dict(case.weights(), strict=True)
    theirs, scale = diffusers_network(case.constructor["diffusers"], case.weights())
    inputs = case.tensors("in.")
    if sprint:
        check_sprint(case, ours, theirs, inputs)
        return
    sizes = [name.removeprefix("x.") for name in inputs if name.startswith("x.")]
    assert sizes, f"{case.name} holds no inputs"
    for size in sizes:
        x, time, y, mask = (inputs[f"{name}.{size}"] for name in ("x", "t", "y", "mask"))
        for label, timestep in (("", time), (f"_t+{FRACTION}", time + FRACTION)):
            mine = ours(x, timestep, y, mask)
            live = theirs(x, y.squeeze(1), timestep * scale, encoder_attention_mask=mask, return_dict=False)[0]
            case.assert_close(mine, case.tensor(f"out.official{label}.{size}"), f"ours at {size}{label}")
            case.assert_close(live, case.tensor(f"out.diffusers{label}.{size}"), f"live diffusers at {size}{label}")
            if not label or ours.architecture.timestep_norm_scale_factor != 1.0:
                case.assert_close(mine, live, f"ours against live diffusers at {size}{label}")
        ours_fractional = SanaMS(**official, truncate_timestep=False).eval()
        ours_fractional.load_state_dict(case.weights(), strict=True)
        mine = ours_fractional(x, time + FRACTION, y, mask)
        case.assert_close(mine, case.tensor(f"out.diffusers_t+{FRACTION}.{size}"), f"untruncated at {size}")


def check_sprint(case: Case, ours: SanaMSCM, theirs: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
    x, angle, y, mask = (inputs[name] for name in ("x", "t", "y", "mask"))
    scale = torch.full((x.shape[0],), float(case.call["cfg_scale"]))
    mine = ours(x, angle, y, mask, {"cfg_scale": scale})
    sigma = angle.sin() / (angle.cos() + angle.sin())
    s = sigma.view(-1, 1, 1, 1)
    radius = (s**2 + (1 - s) ** 2).sqrt()
    guidance = scale * theirs.config.guidance_embeds_scale
    flow = theirs(x * radius, y.squeeze(1), sigma, guidance=guidance, encoder_attention_mask=mask, return_dict=False)[0]
    live = ((1 - 2 * s) * x * radius + (1 - 2 * s + 2 * s**2) * flow) / radius
    case.assert_close(mine, case.tensor("out.official"), "ours")
    case.assert_close(live, case.tensor("out.diffusers"), "live diffusers")
    case.assert_close(mine, live, "ours against live diffusers")
