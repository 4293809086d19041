"""Names become networks: files of ComfyUI's folders, what an earlier pack fetched, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui import catalog, loading
from sana import SanaPipeline
from sana.config import config_from_dict, config_to_dict
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS
from sana.models.checkpoint import CheckpointError
from sana.models.text_encoder import TextEncoderError
from sana.pipelines.options import BUNDLED_MODEL
from sana.utils.hub import FetchError
from tests.comfyui.conftest import BUNDLED, KIND, MODEL, Comfy

CONFIGURATION = "SanaMS_1600M_P1_D20"


def test_a_file_that_says_what_it_is_needs_no_configuration(comfy: Comfy, pipeline: SanaPipeline) -> None:
    shutil.copytree(MODEL, comfy.models / "checkpoints" / "tiny")
    model = loading.open_model("tiny/model.safetensors", CONFIGURATION, "auto")
    assert model.pipeline.config.model.model == "SanaMS_Tiny_P1"
    assert model.scaling_factor == pipeline.autoencoder.scaling_factor
    assert model.latent_channels == 32
    ours, judge = model.pipeline.transformer, pipeline.transformer
    assert ours is not None and judge is not None
    assert all(torch.equal(one, judge.state_dict()[name]) for name, one in ours.state_dict().items())


def test_a_file_without_its_autoencoder_is_refused(comfy: Comfy) -> None:
    shutil.copy(MODEL / "model.safetensors", comfy.models / "checkpoints" / "alone.safetensors")
    with pytest.raises(ValueError, match="needs its autoencoder vae beside it"):
        loading.open_model("alone.safetensors", CONFIGURATION, "auto")


def test_a_file_of_another_model_is_refused_in_one_sentence(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.CONFIGURATIONS, CONFIGURATION, "configs/sana_config/tiny/Sana_tiny_img256.yaml")
    weights = {"state_dict": {"x_embedder.proj.weight": torch.zeros(1152, 32, 1, 1)}}
    torch.save(weights, comfy.models / "checkpoints/a.pth")
    with pytest.raises(CheckpointError) as raised:
        loading.open_model("a.pth", CONFIGURATION, "auto")
    assert "\n" not in str(raised.value)
    (comfy.models / "checkpoints/text.pth").write_text("no weights")
    with pytest.raises(CheckpointError) as raised:
        loading.open_model("text.pth", CONFIGURATION, "auto")
    assert "text.pth" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "section", "key", "value", "message"),
    [
        ("sprint", "model", "model", "SanaMSCM_600M_P1_D28", "sample flow models only"),
        ("noise", "scheduler", "predict_flow_v", False, "sample flow models only"),
    ],
)
def test_models_that_the_nodes_cannot_sample_are_refused(
    comfy: Comfy, name: str, section: str, key: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_to_dict(SanaPipeline.from_pretrained(MODEL).config)
    config[section][key] = value
    monkeypatch.setattr(loading.loading, "source_config", lambda source: config_from_dict(config))
    with pytest.raises(ValueError, match=message):
        loading.open_model(BUNDLED, CONFIGURATION, "auto")


def test_what_an_earlier_pack_fetched_is_not_fetched_again(comfy: Comfy) -> None:
    repository = "Efficient-Large-Model/Sana_600M_512px"
    with pytest.raises(FetchError, match="Could not fetch hf://"):
        loading.open_model(repository, CONFIGURATION, "auto")
    file = comfy.models / "sana" / "models--sana--sana-600m-512px" / "checkpoints" / "Sana_600M_512px.pth"
    file.parent.mkdir(parents=True)
    file.write_text("found, and no weights")
    with pytest.raises(CheckpointError, match=r"Sana_600M_512px\.pth"):
        loading.open_model(repository, CONFIGURATION, "auto")


def test_text_encoders_in_folders_read_the_released_instruction(comfy: Comfy) -> None:
    shutil.copytree(MODEL / "text_encoder", comfy.models / "text_encoders" / "gemma")
    encoder = loading.open_text_encoder("gemma/", "cpu", "default").encoder
    assert encoder.model_max_length == 300
    assert encoder.chi_prompt.startswith('Given a user prompt, generate an "Enhanced prompt"')
    assert loading.open_text_encoder(BUNDLED, "cpu", "default").encoder.model_max_length == 64
    with pytest.raises(TextEncoderError, match="cannot be had"):
        loading.open_text_encoder(catalog.TEXT_ENCODERS[0], "cpu", "default")


def test_a_fetched_text_encoder_is_found_under_its_earlier_name(comfy: Comfy) -> None:
    folder = comfy.models / "text_encoders" / "models-efficient-large-model--gemma-2-2b-it"
    shutil.copytree(MODEL / "text_encoder", folder)
    assert loading.open_text_encoder(catalog.TEXT_ENCODERS[0], "cpu", "default").encoder.name == str(folder)


def test_autoencoders_in_folders_and_files(comfy: Comfy) -> None:
    shutil.copytree(MODEL / "vae", comfy.models / "vae" / "tiny")
    for name in ("tiny/", "tiny/model.safetensors"):
        autoencoder = loading.open_autoencoder(name, KIND, "auto")
        assert (autoencoder.scaling_factor, autoencoder.shift_factor) == (1.0, 0.0)
    with pytest.raises(FetchError, match="Could not fetch hf://mit-han-lab"):
        loading.open_autoencoder(catalog.AUTOENCODERS[0], KIND, "auto")


def test_a_file_without_its_config_is_what_the_list_says(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((MODEL / "vae" / "config.json").read_text())
    preset = catalog.AUTOENCODER_KINDS[KIND]
    shutil.copy(MODEL / "vae" / "model.safetensors", comfy.models / "vae" / "lone.safetensors")
    with pytest.raises(CheckpointError, match=rf"lone.safetensors holds no {preset}"):
        loading.open_autoencoder("lone.safetensors", KIND, "auto")
    monkeypatch.setitem(DCAE_PRESETS, preset, loading.parse_config(raw))
    found = loading.open_autoencoder("lone.safetensors", KIND, "auto")
    assert isinstance(found, DCAE)
    stored = load_file(MODEL / "vae" / "model.safetensors")
    assert all(torch.equal(one, stored[name].float()) for name, one in found.state_dict().items())


def test_a_lone_file_in_diffusers_keys(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.models.autoencoder.dc_ae_keys import to_diffusers_state_dict

    raw = json.loads((MODEL / "vae" / "config.json").read_text())
    config = loading.parse_config(raw)
    monkeypatch.setitem(DCAE_PRESETS, catalog.AUTOENCODER_KINDS[KIND], config)
    stored = load_file(MODEL / "vae" / "model.safetensors")
    state = {name: one.contiguous() for name, one in to_diffusers_state_dict(stored).items()}
    save_file(state, comfy.models / "vae" / "diffusers.safetensors")
    found = loading.open_autoencoder("diffusers.safetensors", KIND, "auto")
    assert all(torch.equal(one, stored[name].float()) for name, one in found.state_dict().items())


def test_without_the_checkout_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "bundled", lambda relative: tmp_path / relative)
    with pytest.raises(ValueError, match=r"is missing: install sana with pip install -e"):
        loading.repository_file(BUNDLED_MODEL)
