"""The tables: every official name has a configuration that loads and says what the name says."""

import re

import pytest

from comfyui import catalog
from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.models import TRANSFORMERS
from sana.models.autoencoder.dc_ae import DCAE_PRESETS
from sana.pipelines import loading
from tests.comfyui.conftest import ROOT

SIDES = {"512px": 512, "1024px": 1024, "2Kpx": 2048, "4Kpx": 4096}
SIZES = {"0.6B": 1152, "1.6B": 2240, "4.8B": 2240, "600M": 1152, "1600M": 2240}
DEPTHS = {"0.6B": 28, "1.6B": 20, "4.8B": 60, "600M": 28, "1600M": 20}


@pytest.mark.parametrize("repository", catalog.CHECKPOINTS)
def test_the_configuration_of_a_repository_is_what_its_name_says(repository: str) -> None:
    config = loading.as_config(ROOT / catalog.CHECKPOINTS[repository])
    side = next(SIDES[word] for word in re.split("[_/]", repository) if word in SIDES)
    size = next(word for word in re.split("[_/]", repository) if word in DEPTHS)
    assert config.model.image_size == side
    assert f"P1_D{DEPTHS[size]}" in config.model.model
    assert config.model.model in TRANSFORMERS
    assert ("SANA1.5" in repository) == (config.model.qk_norm and config.model.cross_norm)
    assert (config.vae.vae_latent_dim, config.vae.vae_downsample_rate) == (32, 32)


@pytest.mark.parametrize("name", catalog.CONFIGURATIONS)
def test_the_configurations_are_flow_models_of_a_dcae(name: str) -> None:
    config = loading.as_config(ROOT / catalog.CONFIGURATIONS[name])
    assert config.scheduler.predict_flow_v and config.vae.vae_type == "AutoencoderDC"
    assert config.vae.vae_pretrained in catalog.AUTOENCODERS
    side = 4096 if name.endswith("4K") else 2048 if name.endswith("2K") else 1024
    assert config.model.image_size == side


def test_the_kinds_of_autoencoder_are_known() -> None:
    assert set(catalog.AUTOENCODER_KINDS.values()) <= set(DCAE_PRESETS)
    assert catalog.DEFAULT_AUTOENCODER_KIND in catalog.AUTOENCODER_KINDS
    assert catalog.DEFAULT_CONFIGURATION in catalog.CONFIGURATIONS


def test_sizes_are_those_of_the_released_node() -> None:
    assert set(catalog.SIZES) >= {"1024px", "512px", "2K", "4K"}
    assert all(len(sizes) == 40 and sizes["1.00"][0] == sizes["1.00"][1] for sizes in catalog.SIZES.values())
    assert catalog.SIZES["1024px"]["0.25"] == (512, 2048)  # the released node's width and height
    assert catalog.SIZES["4K"]["1.67"] == (5120, 3072)
    assert all(re.fullmatch(r"\d\.\d\d", ratio) for sizes in catalog.SIZES.values() for ratio in sizes)
    assert sorted(catalog.SIZES["2K"].values()) == sorted(ASPECT_RATIOS["ASPECT_RATIO_2048"].values())
