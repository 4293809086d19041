"""DC-AE names of diffusers against the recorded key map, manifests and configs."""

import json
import re

import pytest
import torch

from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DCAEConfig
from sana.models.autoencoder.dc_ae_keys import (
    config_from_diffusers,
    config_to_diffusers,
    diffusers_names,
    from_diffusers_state_dict,
    to_diffusers_state_dict,
)
from tests.parity.common import DEFAULT_FOLDER

MANIFESTS = DEFAULT_FOLDER / "manifests"
KEYMAP = json.loads((MANIFESTS / "dcae_efficientvit_to_diffusers_keymap.json").read_text())
DIFFUSERS = json.loads((MANIFESTS / "dcae_diffusers_manifests.json").read_text())
TINY = DCAEConfig(
    latent_channels=4, encoder_width_list=(4, 8), encoder_depth_list=(1, 1), decoder_width_list=(4, 8),
    decoder_depth_list=(1, 1), encoder_block_type=("ResBlock", "EViTS5_GLU"), head_dim=4,
)  # fmt: skip


@pytest.mark.parametrize("name", KEYMAP)
def test_state_dicts_match_the_recorded_map(name: str) -> None:
    with torch.device("meta"):
        state = DCAE(DCAE_PRESETS[name]).state_dict()
    converted = to_diffusers_state_dict(state)
    assert {key: list(tensor.shape) for key, tensor in converted.items()} == DIFFUSERS[name]["keys"]
    names = diffusers_names(state)
    for theirs, source in KEYMAP[name]["map"].items():
        ours = source if isinstance(source, str) else source[0]
        assert names[ours] == re.sub(r"\.to_[qkv]\.", ".to_qkv.", theirs)
    back = from_diffusers_state_dict(converted, DCAE_PRESETS[name])
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in state.items()}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_configs_match_the_recorded_ones(name: str) -> None:
    recorded = {key: value for key, value in DIFFUSERS[name]["config"].items() if not key.startswith("_")}
    assert config_from_diffusers(recorded | {"_diffusers_version": "0.0"}) == DCAE_PRESETS[name]
    stages = len(recorded["decoder_block_out_channels"])
    for key in ("decoder_norm_types", "decoder_act_fns"):  # diffusers writes one value for all stages
        if isinstance(recorded[key], str):
            recorded[key] = [recorded[key]] * stages
    assert config_to_diffusers(DCAE_PRESETS[name]) == recorded | {"_class_name": "AutoencoderDC"}


def test_defaults_are_those_of_diffusers() -> None:
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        theirs = AutoencoderDC(encoder_block_types="EfficientViTBlock", decoder_block_types="EfficientViTBlock")
        ours = DCAE(
            config_from_diffusers(
                {"encoder_block_types": "EfficientViTBlock", "decoder_block_types": "EfficientViTBlock"}
            )
        )
    converted = to_diffusers_state_dict(ours.state_dict())
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in theirs.state_dict().items()}


def test_the_round_trip_keeps_every_bit() -> None:
    state = DCAE(TINY).state_dict()
    back = from_diffusers_state_dict(to_diffusers_state_dict(state), TINY)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_missing_and_strange_tensors() -> None:
    state = to_diffusers_state_dict(DCAE(TINY).state_dict())
    state["encoder.mask"] = torch.zeros(1)
    assert "encoder.mask" in from_diffusers_state_dict(state, TINY)  # for the strict load to refuse
    del state["encoder.down_blocks.1.0.attn.to_k.weight"]
    with pytest.raises(ValueError, match=r"lack 1 tensors .*encoder\.down_blocks\.1\.0\.attn\.to_k\.weight"):
        from_diffusers_state_dict(state, TINY)
    with pytest.raises(ValueError, match=r"'decoder\.mask' is no key of a DC-AE"):
        diffusers_names(["decoder.mask"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"use_ema": True}, "unknown keys in the AutoencoderDC config: use_ema"),
        ({"encoder_block_types": "Mamba"}, "encoder_block_types: unknown 'Mamba'"),
        ({"downsample_block_type": "pool"}, "downsample_block_type: unknown 'pool'; allowed are conv, pixel_unshuffle"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types: unknown 'layer_norm'"),
        ({"decoder_block_types": "EfficientViTBlock", "decoder_act_fns": "relu"}, "needs rms_norm and silu"),
    ],
)
def test_configs_that_are_refused(raw: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_diffusers(raw)


def test_networks_that_diffusers_does_not_have() -> None:
    with pytest.raises(ValueError, match="has no encoder_act"):
        config_to_diffusers(DCAEConfig(encoder_act="relu"))
