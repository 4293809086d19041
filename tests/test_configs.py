"""Every YAML under configs/: it says what the official file says, loads, validates, and builds the official network."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.config_yaml import read_yaml
from sana.models import AUTOENCODERS, TRANSFORMERS, build_transformer, transformer_arguments

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "tests/parity/data/manifests"
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml"))
OFFICIAL: dict[str, dict[str, Any]] = json.loads((MANIFESTS / "official_yaml_flat.json").read_text())
SUMMARY: dict[str, dict[str, Any]] = json.loads((MANIFESTS / "_summary.json").read_text())
TEACHER = "configs/sana_sprint_config/1024ms/SanaSprint_1600M_img1024_bf16_normT_allqknorm_teacher_ft.yaml"
SPRINT_600M = "configs/sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml"


@cache
def manifest(name: str) -> dict[str, Any]:
    """Returns a state-dict manifest, with the keys of the file that it points to."""
    content = json.loads((MANIFESTS / name).read_text())
    return content | {"keys": manifest(content["same_keys_as"])["keys"]} if "same_keys_as" in content else content


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def corrected(path: str) -> dict[str, Any]:
    """Returns the official values of a file, the two files that do not load officially with their one correction."""
    flat = dict(OFFICIAL[path])
    if path == TEACHER:
        flat["scheduler.predict_flow_v"] = flat.pop("scheduler.predict_v")
    if path == SPRINT_600M:
        flat["model.model"] = "SanaMSCM_600M_P1_D28"
    return flat


def test_every_official_file_is_there() -> None:
    assert set(OFFICIAL) <= set(CONFIGS)
    assert all(path in OFFICIAL or path.startswith("configs/sana_config/tiny/") for path in CONFIGS)


@pytest.mark.parametrize("path", sorted(OFFICIAL))
def test_values_are_official(path: str) -> None:
    assert flatten(read_yaml(ROOT / path)) == corrected(path)


@pytest.mark.parametrize("path", CONFIGS)
def test_loads_and_builds(path: str) -> None:
    config = load_config(ROOT / path)
    with torch.device("meta"):
        network = build_transformer(config)
    assert config.vae.vae_type in AUTOENCODERS
    if path not in SUMMARY:
        return
    expected = manifest(Path(SUMMARY[path]["file"]).name)
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == expected["keys"]
    assert sum(parameter.numel() for parameter in network.parameters()) == SUMMARY[path]["n_params"]
    assert {name for name, _ in network.named_buffers()} == set(expected["buffers"])
    arguments = transformer_arguments(config)
    assert {key: arguments[key] for key in expected["constructor_kwargs"]} == expected["constructor_kwargs"]


def test_the_two_corrections_are_needed_and_said(tmp_path: Path) -> None:
    as_published = tmp_path / "teacher.yaml"
    text = (ROOT / TEACHER).read_text(encoding="utf-8")
    assert "# Published as `predict_v`" in text
    as_published.write_text(text.replace("  predict_flow_v: true", "  predict_v: true"), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"unknown key 'scheduler.predict_v'. Did you mean 'scheduler.predict_flow_v'"
    ):
        load_config(as_published)
    assert "# Published as SanaMSCM_600M_P1_D20" in (ROOT / SPRINT_600M).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="Known names: .*SanaMSCM_600M_P1_D28"):
        TRANSFORMERS["SanaMSCM_600M_P1_D20"]
