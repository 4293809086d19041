"""Key map and configs of the transformer against the recorded ones of the official converter."""

import json

import pytest
import torch

from sana.models.checkpoint import CheckpointError
from sana.models.diffusers_config import (
    MODEL_TYPES,
    arch_of_transformer,
    model_type_arch,
    official_config,
    sampler_of_scheduler,
    scheduler_config,
    transformer_config,
)
from sana.models.diffusers_keys import EXTRA_KEYS, diffusers_names, from_diffusers, is_diffusers, to_diffusers
from tests.parity.common import parity_folder

MANIFESTS = parity_folder() / "manifests"
RECORDED = json.loads((MANIFESTS / "official_to_diffusers_keymap.json").read_text())["mappings"]
# recorded name -> our (model_type, image_size)
TYPES = {
    "SanaMS_600M_P1_D28": ("SanaMS_600M_P1_D28", 1024),
    "SanaMS_1600M_P1_D20": ("SanaMS_1600M_P1_D20", 1024),
    "SanaMS_1600M_P1_D20@2048": ("SanaMS_1600M_P1_D20", 2048),
    "SanaMS_1600M_P1_D20@4096": ("SanaMS_1600M_P1_D20", 4096),
    "SanaMS1.5_1600M_P1_D20": ("SanaMS1.5_1600M_P1_D20", 1024),
    "SanaSprint_600M_P1_D28": ("SanaSprint_600M_P1_D28", 1024),
    "SanaSprint_1600M_P1_D20": ("SanaSprint_1600M_P1_D20", 1024),
}


def manifest_state(name: str) -> dict[str, torch.Tensor]:
    """The official state dict of a recorded manifest, without storage."""
    manifest = json.loads((MANIFESTS / f"{RECORDED[name]['manifest']}.json").read_text())
    if not manifest["keys"]:
        manifest = json.loads((MANIFESTS / manifest["same_keys_as"]).read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}


def recorded_map(name: str, depth: int) -> dict[str, str | list[str]]:
    """The recorded template with every block written out."""
    expanded = {}
    for key, source in RECORDED[name]["template"].items():
        for index in range(depth) if "{i}" in key else [0]:
            filled = json.loads(json.dumps(source).replace("{i}", str(index)))
            expanded[key.replace("{i}", str(index))] = filled
    return expanded


@pytest.mark.parametrize("name", list(RECORDED))
def test_every_key_maps_as_the_official_converter_maps_it(name: str) -> None:
    state = manifest_state(name)
    guidance = "cfg_embedder.mlp.0.weight" in state
    ours = {}
    for key in state:
        names = diffusers_names(key, guidance) or ()
        for index, diffusers_key in enumerate(names):
            part = key if len(names) == 1 else [key, f"chunk {index} of {len(names)} along dim 0"]
            ours[diffusers_key] = part
    assert ours == recorded_map(name, RECORDED[name]["transformer_config"]["num_layers"])
    assert {key for key in state if not diffusers_names(key, guidance)} == set(RECORDED[name]["unused_official_keys"])


@pytest.mark.parametrize("name", list(TYPES))
def test_the_config_of_every_model_type_is_the_recorded_one(name: str) -> None:
    arch = model_type_arch(*TYPES[name])
    config = transformer_config(arch["kwargs"], manifest_state(name))
    recorded = RECORDED[name]["transformer_config"]
    assert {key: config[key] for key in recorded if not key.startswith("_")} == {
        key: value for key, value in recorded.items() if not key.startswith("_")
    }
    back = arch_of_transformer(config, "here")
    assert back["class"] == arch["class"]
    assert {key: back["kwargs"][key] for key in arch["kwargs"]} == arch["kwargs"]


def test_the_4800m_model_that_the_official_converter_rejects_converts() -> None:
    arch = model_type_arch("SanaMS1.5_4800M_P1_D60", 1024)
    name = "sana1-5_config__1024ms__Sana_4800M_1024px_came8bit_grow_constant_allqknorm_bf16_lr2e5.json"
    keys = json.loads((MANIFESTS / name).read_text())["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    assert transformer_config(arch["kwargs"], state)["num_layers"] == 60
    kept, extra, strangers = to_diffusers(state)
    assert strangers == [] and set(extra) == {"y_embedder.y_embedding"} and is_diffusers(kept)
    assert all(model_type in MODEL_TYPES for model_type in ("SanaMS1.5_4800M_P1_D60", "SanaMS_1600M_P1_D20"))


@pytest.mark.parametrize("with_pos_embed", [True, False])
def test_logvar_is_split_off_with_and_without_pos_embed(with_pos_embed: bool) -> None:
    state = manifest_state("SanaSprint_600M_P1_D28")
    if not with_pos_embed:
        state.pop("pos_embed")
    kept, extra, strangers = to_diffusers(state)
    assert strangers == []
    assert set(extra) == set(EXTRA_KEYS)
    assert not any("logvar" in key or "pos_embed" in key for key in kept)


def random_state() -> dict[str, torch.Tensor]:
    keys = json.loads((MANIFESTS / f"{RECORDED['SanaSprint_600M_P1_D28']['manifest']}.json").read_text())["keys"]
    small = {key: [6 * max(1, min(d, 4)) if i == 0 else min(d, 3) for i, d in enumerate(s)] for key, s in keys.items()}
    return {
        key: torch.randn(shape) for key, shape in small.items() if "blocks." not in key or ".1." in key or ".0." in key
    }


def test_there_and_back_is_exact() -> None:
    state = random_state()
    kept, extra, strangers = to_diffusers(state)
    back, unknown = from_diffusers(kept | extra)
    assert (strangers, unknown) == ([], [])
    assert set(back) == set(state) - {"pos_embed"}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_incomplete_and_foreign_keys_are_named() -> None:
    kept, _, _ = to_diffusers(random_state())
    kept.pop("transformer_blocks.0.attn1.to_k.weight")
    kept["transformer_blocks.0.attn3.weight"] = torch.zeros(1)
    _, unknown = from_diffusers(kept)
    assert unknown == [
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn1.to_v.weight",
        "transformer_blocks.0.attn3.weight",
    ]
    assert to_diffusers({"blocks.0.mlp.fc1.weight": torch.zeros(1)})[2] == ["blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "flash"}, "no Sana transformer with attn_type='flash'"),
        ({"ffn_type": "mlp"}, "ffn_type='mlp'"),
        ({"cross_norm": True}, "one switch for model.qk_norm and model.cross_norm"),
        ({"use_pe": True, "pos_embed_type": "3d_rope"}, "no position embedding '3d_rope'"),
        ({"depth": 27}, "have 28 blocks, and the model type or config says 27"),
        ({"hidden_size": 2240, "num_heads": 20}, r"x_embedder.proj.weight is \(1152, 32, 1, 1\) in the file"),
        ({"qk_norm": True, "cross_norm": True}, "lack blocks.0.attn.q_norm.weight, and qk_norm is True"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(change: dict, message: str) -> None:
    kwargs = model_type_arch("SanaMS_600M_P1_D28", 1024)["kwargs"] | change
    with pytest.raises(CheckpointError, match=message):
        transformer_config(kwargs, manifest_state("SanaMS_600M_P1_D28"))


@pytest.mark.parametrize(
    ("scheduler_type", "sampler", "shift"),
    [("flow-dpm_solver", "flow_dpm-solver", 4.0), ("flow-euler", "flow_euler", 4.0), ("scm", "scm", 1.0)],
)
def test_schedulers_map_both_ways(scheduler_type: str, sampler: str, shift: float) -> None:
    assert sampler_of_scheduler(scheduler_config(scheduler_type, 4.0)) == (sampler, shift)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="scheduler_type 'ddim' is unknown; allowed are flow-dpm_solver"):
        scheduler_config("ddim", 3.0)
    with pytest.raises(ValueError, match="model_type 'Sana' is unknown"):
        model_type_arch("Sana", 1024)
    with pytest.raises(ValueError, match="image_size 1000 is unknown"):
        model_type_arch("SanaMS_600M_P1_D28", 1000)
    with pytest.raises(CheckpointError, match="DDIMScheduler has no counterpart"):
        sampler_of_scheduler({"_class_name": "DDIMScheduler"})
    with pytest.raises(CheckpointError, match="is the config of FluxTransformer2DModel"):
        arch_of_transformer({"_class_name": "FluxTransformer2DModel"}, "config.json")
    with pytest.raises(CheckpointError, match="no config of a Sana transformer"):
        arch_of_transformer({"in_channels": 4}, "config.json")


@pytest.mark.parametrize("model_type", ["SanaMS_600M_P1_D28", "SanaMS1.5_1600M_P1_D20", "SanaSprint_600M_P1_D28"])
def test_a_derived_config_builds_the_same_network(model_type: str) -> None:
    from sana.config import config_from_dict
    from sana.models import build_transformer

    arch = model_type_arch(model_type, 1024)
    sampler = "scm" if arch["class"] == "SanaMSCM" else "flow_dpm-solver"
    raw = official_config(arch, sampler, 3.0)
    with torch.device("meta"):
        model = build_transformer(config_from_dict(raw))
    assert type(model).__name__ == arch["class"]
    built = model.init_kwargs
    assert {key: built[key] for key in arch["kwargs"]} == arch["kwargs"]
