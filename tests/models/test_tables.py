"""What a config becomes: the official constructor arguments, the switches, and the size of a network without preset."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sana.config import config_from_dict, load_config
from sana.models import build_transformer, transformer_arguments
from tests.parity.common import DEFAULT_FOLDER, Case

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {
        "model": "SanaMS_Tiny_P1",
        "image_size": 256,
        "class_dropout_prob": 0.1,
        "extra": {"depth": 2, "hidden_size": 64, "num_heads": 2},
    },
    "vae": {"vae_latent_dim": 8},
    "text_encoder": {"caption_channels": 24, "model_max_length": 12},
    "scheduler": {"pred_sigma": False},
}


def official() -> list[dict[str, Any]]:
    case = Case({}, DEFAULT_FOLDER)
    names = sorted(path.name for path in (DEFAULT_FOLDER / "manifests").glob("*config__*.json"))
    return [case.load(f"manifests/{name}") for name in names]


@pytest.mark.parametrize("manifest", official(), ids=lambda manifest: manifest["config"])
def test_every_official_yaml_gives_the_official_constructor_arguments(manifest: dict[str, Any]) -> None:
    config = load_config(str(ROOT / manifest["config"]))
    assert config.model.model in (manifest["model"], "SanaMSCM_600M_P1_D20")
    arguments = transformer_arguments(config)
    assert {name: arguments[name] for name in manifest["constructor_kwargs"]} == manifest["constructor_kwargs"]


def small_config(**model: Any) -> Any:
    return config_from_dict({**SMALL, "model": {**SMALL["model"], **model}})


def test_a_small_network_takes_its_size_from_extra() -> None:
    arch = build_transformer(small_config()).architecture
    assert (arch.depth, arch.hidden_size, arch.num_heads, arch.in_channels, arch.input_size) == (2, 64, 2, 8, 8)


def test_switches_reach_the_network() -> None:
    network = build_transformer(small_config(fp32_attention=True), clip_fp16=True)
    assert network.architecture.clip_fp16 and network.blocks[0].attn.fp32_attention
    assert not build_transformer(small_config(fp32_attention=False)).blocks[0].attn.fp32_attention


def test_networks_build_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = build_transformer(small_config(model="SanaMS_4800M_P1_D60", image_size=4096))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert len(network.blocks) == 60  # `extra` sizes only the network that has no released size


def test_an_unknown_network_suggests_one() -> None:
    config = small_config()
    config.model.model = "SanaMS_Tiny_P2"
    with pytest.raises(ValueError, match=r"Did you mean 'SanaMS_Tiny_P1'"):
        build_transformer(config)
