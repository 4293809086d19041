"""What ComfyUI reads of the pack, and how it loads it."""

import builtins
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.conftest import ROOT, Comfy, load_pack

NAMES = {
    "SanaCheckpointLoader": ("load_checkpoint", "ExtraModels/Sana", ("MODEL",)),
    "SanaResolutionSelect": ("get_res", "ExtraModels/Sana", ("INT", "INT")),
    "SanaResolutionCond": ("add_cond", "ExtraModels/Sana", ("CONDITIONING",)),
    "SanaTextEncode": ("encode", "ExtraModels/Sana", ("CONDITIONING",)),
    "EmptySanaLatentImage": ("generate", "ExtraModels/Sana", ("LATENT",)),
    "EmptyDCAELatentImage": ("generate", "latent", ("LATENT",)),
    "GemmaLoader": ("load_model", "ExtraModels/Gemma", ("GEMMA",)),
    "GemmaTextEncode": ("encode", "ExtraModels/Gemma", ("CONDITIONING",)),
    "ExtraVAELoader": ("load_vae", "ExtraModels", ("VAE",)),
    "SanaSampler": ("sample", "ExtraModels/Sana", ("LATENT",)),
}


def test_the_names_that_workflows_know(comfy: Comfy) -> None:
    nodes = comfy.pack.NODE_CLASS_MAPPINGS
    assert {name: (cls.FUNCTION, cls.CATEGORY, cls.RETURN_TYPES) for name, cls in nodes.items()} == NAMES
    assert set(comfy.pack.NODE_DISPLAY_NAME_MAPPINGS) == set(NAMES)
    assert all(callable(getattr(cls, cls.FUNCTION)) for cls in nodes.values())


def test_inputs_are_of_known_form(comfy: Comfy) -> None:
    for name, cls in comfy.pack.NODE_CLASS_MAPPINGS.items():
        types: Any = cls.INPUT_TYPES()
        assert set(types) <= {"required", "optional"}, name
        for info in (types["required"] | types.get("optional", {})).values():
            options = info[1] if len(info) > 1 else {}
            if not isinstance(info[0], str):
                assert info[0] and options.get("default", info[0][0]) in info[0], name
            elif "default" in options and "min" in options:
                assert options["min"] <= options["default"] <= options["max"], name


def test_a_copied_folder_loads(tmp_path: Path) -> None:
    folder = tmp_path / "custom.nodes" / "sana"
    shutil.copytree(ROOT / "comfyui", folder, ignore=shutil.ignore_patterns("__pycache__"))
    pack = load_pack(folder)
    assert set(pack.NODE_CLASS_MAPPINGS) == set(NAMES)
    (model,) = pack.NODE_CLASS_MAPPINGS["SanaResolutionSelect"].INPUT_TYPES()["required"]["model"][:1]
    assert "1024px" in model


def test_without_the_package_one_sentence_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sana":
            raise ModuleNotFoundError("No module named 'sana'", name="sana")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install -e"):
        load_pack(ROOT / "comfyui")
    sys.modules.pop(str(ROOT / "comfyui"), None)
