"""Autoencoder folders of every kind: written, read back, and refused when they are not what they say."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.models import build_autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS, DCAEConfig
from sana.models.autoencoder.dc_ae_keys import config_to_diffusers, to_diffusers_state_dict
from sana.models.autoencoder.loading import load_autoencoder, save_autoencoder
from sana.models.checkpoint import CheckpointError

CONFIG = DCAEConfig(
    latent_channels=4, encoder_width_list=(8, 16), encoder_depth_list=(1, 1), decoder_width_list=(8, 16),
    decoder_depth_list=(1, 1), decoder_norm=("bn2d", "trms2d"), decoder_block_type=("ResBlock", "EViTS5_GLU"),
    head_dim=8, scaling_factor=0.5,
)  # fmt: skip


@pytest.fixture
def model() -> DCAE:
    return DCAE(CONFIG).eval()


def write(folder: Path, raw: dict, state: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)
    return folder


def assert_same(loaded: DCAE, model: DCAE) -> None:
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert not loaded.training


def test_our_folder_round_trips(model: DCAE, tmp_path: Path) -> None:
    model.scaling_factor = 0.625  # measured after training
    save_autoencoder(model, tmp_path / "a" / "vae")
    assert sorted(path.name for path in (tmp_path / "a" / "vae").iterdir()) == ["config.json", "model.safetensors"]
    for ref in (tmp_path / "a" / "vae", tmp_path / "a"):  # the folder itself, or the one around it
        loaded = load_autoencoder(ref)
        assert_same(loaded, model)
        assert loaded.scaling_factor == 0.625
        assert loaded.config == dataclasses.replace(CONFIG, scaling_factor=0.625)


def test_bf16_storage_is_cast_when_loading(model: DCAE, tmp_path: Path) -> None:
    save_autoencoder(model, tmp_path, dtype=torch.bfloat16)
    assert load_file(tmp_path / "model.safetensors")["encoder.project_in.conv.weight"].dtype == torch.bfloat16
    expected = {
        key: tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(expected)
    assert_same(load_autoencoder(tmp_path), model)
    assert load_autoencoder(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_loaded_weights_own_their_memory(model: DCAE, tmp_path: Path) -> None:
    save_autoencoder(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load_autoencoder(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert_same(load_autoencoder(tmp_path), model)


def test_a_folder_that_diffusers_wrote(tmp_path: Path) -> None:
    from diffusers import AutoencoderDC

    theirs = AutoencoderDC.from_config(config_to_diffusers(CONFIG)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    assert ours.scaling_factor == 0.5
    images = torch.randn(1, 3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(images), theirs.encode(images).latent * 0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(images)), theirs(images).sample, rtol=1e-4, atol=1e-5)


def test_the_original_format_names_a_preset(model: DCAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DCAE_PRESETS, "dc-ae-f32c32-sana-1.0", CONFIG)
    folder = write(tmp_path, {"model_name": "dc-ae-f32c32-sana-1.0"}, model.state_dict())
    assert_same(load_autoencoder(folder), model)
    (folder / "config.json").write_text('{"model_name": "dc-ae-f32c32-sana-1.2"}')
    with pytest.raises(CheckpointError, match=r"unknown model_name 'dc-ae-f32c32-sana-1\.2'.*dc-ae-f128c512-in-1\.0"):
        load_autoencoder(folder)


@pytest.mark.parametrize("stored", [None, "absent"])
def test_a_diffusers_config_without_a_scaling_factor(model: DCAE, tmp_path: Path, stored: str | None) -> None:
    raw = config_to_diffusers(CONFIG) | {"scaling_factor": None}
    if stored == "absent":
        del raw["scaling_factor"]
    write(tmp_path, raw, to_diffusers_state_dict(model.state_dict()), "diffusion_pytorch_model.safetensors")
    loaded = load_autoencoder(tmp_path)
    assert_same(loaded, model)
    assert loaded.scaling_factor == 0.41407


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not readable JSON"),
        ("[1]", "holds a list"),
        ('{"_class_name": "UNet"}', "describes 'UNet'; known are DCAE, AutoencoderDC and AutoencoderKL"),
        ('{"class": "DCAE", "wings": 2}', "unknown keys in config.json: wings"),
        ('{"class": "DCAE", "encoder_depth_list": 3}', "is no readable DC-AE"),
        ('{"_class_name": "AutoencoderDC", "wings": 2}', "unknown keys in the AutoencoderDC config: wings"),
    ],
)
def test_configs_that_are_refused(model: DCAE, tmp_path: Path, content: str, message: str) -> None:
    save_autoencoder(model, tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(tmp_path)


def test_folders_that_are_no_autoencoder(model: DCAE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor vae/config\.json is in it"):
        load_autoencoder(tmp_path)
    save_autoencoder(model, tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_autoencoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.project_in.conv.bias": None}, r"encoder\.project_in\.conv\.bias is missing\."),
        ({"encoder.mask": torch.zeros(1)}, r"encoder\.mask is unknown\."),
        (
            {"encoder.project_in.conv.bias": torch.zeros(9)},
            r"conv\.bias is \(9,\) in the file and \(8,\) by its config",
        ),
    ],
)
def test_weights_that_do_not_fit(model: DCAE, tmp_path: Path, change: dict, message: str) -> None:
    save_autoencoder(model, tmp_path)
    state = {key: tensor for key, tensor in (model.state_dict() | change).items() if tensor is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(tmp_path)


def test_a_failed_write_leaves_the_old_folder(model: DCAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_autoencoder(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sana.models.autoencoder.loading.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_autoencoder(DCAE(CONFIG), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def vae_section(folder: Path, **change: object) -> SimpleNamespace:
    values = {
        "vae_type": "AutoencoderDC",
        "vae_pretrained": str(folder),
        "weight_dtype": "bf16",
        "sample_posterior": True,
        "vae_latent_dim": 4,
        "vae_downsample_rate": 2,
    }
    return SimpleNamespace(vae=SimpleNamespace(**(values | change)))


def test_build_autoencoder_reads_the_vae_section(model: DCAE, tmp_path: Path) -> None:
    save_autoencoder(model, tmp_path)
    assert build_autoencoder(vae_section(tmp_path)).dtype == torch.bfloat16
    assert_same(build_autoencoder(vae_section(tmp_path, vae_type="dc-ae"), dtype=torch.float32), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_type": "sdxl"}, "vae.vae_type is 'sdxl', and .* holds a DCAE"),
        ({"vae_type": "AutoencoderD"}, "Did you mean 'AutoencoderDC'"),
        ({"vae_latent_dim": 32}, "vae.vae_latent_dim is 32, and the autoencoder .* has 4"),
        ({"vae_downsample_rate": 32}, "vae.vae_downsample_rate is 32, and the autoencoder .* has 2"),
    ],
)
def test_build_autoencoder_refuses_contradictions(
    model: DCAE, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_autoencoder(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        build_autoencoder(vae_section(tmp_path, **change))
