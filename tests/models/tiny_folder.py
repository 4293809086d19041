"""The tiny model of the recorded end-to-end cases, written as one of our model folders. No test is here."""

import shutil
from pathlib import Path

import torch

from sana.config import SanaConfig, config_from_dict, config_to_dict
from sana.models import build_transformer
from sana.models.autoencoder.dc_ae import DCAE
from sana.models.autoencoder.dc_ae_keys import config_from_diffusers, from_diffusers_state_dict
from sana.models.autoencoder.loading import save_autoencoder
from sana.models.weights import CheckpointMetadata, load_weights, save_checkpoint
from tests.parity.common import Case, parity_folder

# Two tensors with official names, for tests that need no model.
STATE = {"x_embedder.proj.weight": torch.arange(6.0).reshape(2, 3), "blocks.0.attn.qkv.weight": torch.ones(2)}
PACK = Case({"name": "tiny", "kind": "e2e", "tolerance": {}}, parity_folder())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts equal keys, dtypes and values."""
    assert set(actual) == set(expected)
    for key in expected:
        assert torch.equal(actual[key], expected[key]) and actual[key].dtype == expected[key].dtype, key


def tiny_config(sprint: bool = False) -> SanaConfig:
    """The recorded configuration, its size told to a preset, its parts beside the checkpoint."""
    recorded = PACK.load("e2e/config_sprint.json" if sprint else "e2e/config.json")
    raw = dict(recorded["official_yaml_as_json"])
    size = {key: recorded["sana_ms"][key] for key in ("depth", "hidden_size", "num_heads")}
    raw["model"] = raw["model"] | {"model": "SanaMSCM_Tiny_P1" if sprint else "SanaMS_Tiny_P1", "extra": size}
    raw["model"]["logvar"] = False  # the recorded weights have no such head
    raw["vae"] = raw["vae"] | {"vae_pretrained": "vae"}
    raw["text_encoder"] = raw["text_encoder"] | {"text_encoder_name": "text_encoder"}
    return config_from_dict(raw)


def tiny_state(sprint: bool = False, part: str = "dit") -> dict[str, torch.Tensor]:
    """The recorded weights of one part ("dit" or "vae") under the recorded keys."""
    name = "e2e/weights_sprint.safetensors" if sprint and part == "dit" else "e2e/weights.safetensors"
    stored = PACK.load(name)
    return {key.removeprefix(f"{part}."): value for key, value in stored.items() if key.startswith(f"{part}.")}


def tiny_transformer(sprint: bool = False) -> torch.nn.Module:
    """The recorded transformer."""
    model = build_transformer(tiny_config(sprint))
    load_weights(model, tiny_state(sprint))
    return model.eval()


def tiny_metadata(sprint: bool = False) -> CheckpointMetadata:
    """What the tiny checkpoint says about itself."""
    config, model = tiny_config(sprint), tiny_transformer(sprint)
    return CheckpointMetadata(
        arch={"class": type(model).__name__, "kwargs": model.init_kwargs},
        precision="fp32",
        flow_shift=config.scheduler.flow_shift,
        chi_prompt=list(config.text_encoder.chi_prompt),
        license="Apache-2.0",
        config=config_to_dict(config),
    )


def write_tiny_folder(folder: Path, sprint: bool = False) -> Path:
    """Writes `model.safetensors`, `vae/` and `text_encoder/`; returns the folder."""
    save_checkpoint(folder / "model.safetensors", tiny_transformer(sprint), tiny_metadata(sprint))
    described = config_from_diffusers(PACK.load("e2e/config.json")["vae_config"])
    autoencoder = DCAE(described)
    state = tiny_state(part="vae")
    ours = state if "encoder.project_in.conv.weight" in state else from_diffusers_state_dict(state, described)
    autoencoder.load_state_dict(ours)
    save_autoencoder(autoencoder, folder / "vae")
    shutil.copytree(PACK.path("text/tiny_gemma2"), folder / "text_encoder")
    for file in PACK.path("text/tiny_tokenizer").iterdir():
        shutil.copy(file, folder / "text_encoder" / file.name)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return folder
