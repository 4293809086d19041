"""The registered networks: state-dict keys and shapes of every official YAML, and the released sizes."""

from functools import partial
from typing import Any

import pytest
import torch

from sana.models import TRANSFORMERS
from sana.models.transformer.controlnet import SanaMSControlNet
from sana.models.transformer.sana import Sana, SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from tests.models.transformer.networks import SMALL
from tests.parity.common import DEFAULT_FOLDER, Case


def transformer_manifests() -> list[str]:
    folder = DEFAULT_FOLDER / "manifests"
    return sorted(path.name for path in folder.glob("*.json") if "config__" in path.name)


def manifest_keys(name: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    case = Case({}, DEFAULT_FOLDER)
    manifest = case.load(f"manifests/{name}")
    source = manifest.get("same_keys_as")
    return manifest, case.load(f"manifests/{source}")["keys"] if source else manifest["keys"]


@pytest.mark.parametrize("name", transformer_manifests())
def test_state_dict_equals_the_official_manifest(name: str) -> None:
    manifest, keys = manifest_keys(name)
    with torch.device("meta"):
        model = TRANSFORMERS[manifest["model"]](**manifest["constructor_kwargs"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["n_params"]
    assert sorted(key for key, _ in model.named_buffers()) == sorted(manifest["buffers"])
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


PRESETS = {
    "Sana_600M_P1_D28": (Sana, 28, 1152, 16, 1),
    "Sana_1600M_P1_D20": (Sana, 20, 2240, 20, 1),
    "SanaMS_600M_P1_D28": (SanaMS, 28, 1152, 16, 1),
    "SanaMS_600M_P2_D28": (SanaMS, 28, 1152, 16, 2),
    "SanaMS_600M_P4_D28": (SanaMS, 28, 1152, 16, 4),
    "SanaMS_1600M_P1_D20": (SanaMS, 20, 2240, 20, 1),
    "SanaMS_1600M_P2_D20": (SanaMS, 20, 2240, 20, 2),
    "SanaMS_2400M_P1_D30": (SanaMS, 30, 2240, 20, 1),
    "SanaMS_3200M_P1_D40": (SanaMS, 40, 2240, 20, 1),
    "SanaMS_4800M_P1_D60": (SanaMS, 60, 2240, 20, 1),
    "SanaMS1.5_1600M_P1_D20": (SanaMS, 20, 2240, 20, 1),
    "SanaMS1.5_3200M_P1_D40": (SanaMS, 40, 2240, 20, 1),
    "SanaMS1.5_4800M_P1_D60": (SanaMS, 60, 2240, 20, 1),
    "SanaMSCM_600M_P1_D28": (SanaMSCM, 28, 1152, 16, 1),
    "SanaMSCM_1600M_P1_D20": (SanaMSCM, 20, 2240, 20, 1),
    "SanaMSCM_2400M_P1_D30": (SanaMSCM, 30, 2240, 20, 1),
    "SanaMSControlNet_600M_P1_D28": (SanaMSControlNet, 28, 1152, 16, 1),
    "SanaMSControlNet_1600M_P1_D20": (SanaMSControlNet, 20, 2240, 20, 1),
}


def test_presets_are_complete_and_have_the_released_shapes() -> None:
    assert set(TRANSFORMERS) == {*PRESETS, "SanaMS_Tiny_P1", "SanaMSCM_Tiny_P1"}
    for name, (kind, depth, width, heads, patch) in PRESETS.items():
        preset: partial = TRANSFORMERS[name]
        assert preset.func is kind
        expected = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch}
        assert {key: preset.keywords[key] for key in expected} == expected
        assert preset.keywords.get("truncate_timestep", True) is (kind is not Sana)


@pytest.mark.parametrize(("name", "kind"), [("SanaMS_Tiny_P1", SanaMS), ("SanaMSCM_Tiny_P1", SanaMSCM)])
def test_the_size_of_a_tiny_preset_can_be_given(name: str, kind: type[SanaMS]) -> None:
    model = TRANSFORMERS[name](**{**SMALL, "hidden_size": 48, "depth": 3, "num_heads": 2})
    assert type(model) is kind
    assert (model.architecture.hidden_size, len(model.blocks), model.blocks[0].cross_attn.num_heads) == (48, 3, 2)
