"""The lists of the loaders, and what their nodes hand on."""

from typing import Any

import pytest
import torch

from comfyui import catalog
from tests.comfyui.conftest import BUNDLED, KIND, Comfy


def widgets(cls: Any) -> dict[str, Any]:
    types = cls.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def test_lists_show_official_names_the_bundled_model_and_the_users_files(comfy: Comfy) -> None:
    (comfy.models / "checkpoints" / "mine.pth").touch()
    (comfy.models / "diffusers" / "sana").mkdir()
    (comfy.models / "diffusers" / "sana" / "model_index.json").touch()
    (comfy.models / "text_encoders" / "gemma").mkdir()
    (comfy.models / "text_encoders" / "gemma" / "config.json").touch()
    names = widgets(comfy.nodes["SanaCheckpointLoader"])["ckpt_name"][0]
    assert names == [*catalog.CHECKPOINTS, BUNDLED, "mine.pth", "sana/"]
    assert names[0] == "Efficient-Large-Model/SANA1.5_1.6B_1024px"
    encoders = widgets(comfy.nodes["GemmaLoader"])["model_name"][0]
    assert encoders == ["Efficient-Large-Model/gemma-2-2b-it", "unsloth/gemma-2-2b-it-bnb-4bit", BUNDLED, "gemma/"]
    assert widgets(comfy.nodes["ExtraVAELoader"])["vae_name"][0][0] == "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"


def test_defaults_are_the_released_nodes(comfy: Comfy) -> None:
    assert widgets(comfy.nodes["SanaCheckpointLoader"])["model"][1]["default"] == "SanaMS_1600M_P1_D20"
    assert widgets(comfy.nodes["GemmaLoader"])["device"][1]["default"] == "cpu"
    assert widgets(comfy.nodes["GemmaLoader"])["device"][0][:3] == ["auto", "cpu", "cuda"]
    vae = widgets(comfy.nodes["ExtraVAELoader"])
    assert (vae["vae_type"][1]["default"], vae["dtype"][1]["default"]) == (KIND, "BF16")
    assert (
        vae["dtype"][0] == widgets(comfy.nodes["SanaCheckpointLoader"])["dtype"][0] == ["auto", "FP32", "FP16", "BF16"]
    )


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", "fp32"), ("BF16", "bf16"), ("fp16", "fp16")])
def test_dtypes_reach_the_networks(comfy: Comfy, dtype: str, wanted: str) -> None:
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
    vae = comfy.node("ExtraVAELoader", vae_name=BUNDLED, vae_type=KIND, dtype=dtype)
    assert vae.vae_dtype == precision
    model = comfy.node("SanaCheckpointLoader", ckpt_name=BUNDLED, model="SanaMS_1600M_P1_D20", dtype=dtype.lower())
    assert next(model.pipeline.transformer.parameters()).dtype == precision == model.pipeline.dtype


def test_text_dtypes(comfy: Comfy) -> None:
    wanted = {"default": torch.float32, "auto (comfy)": torch.float16, "BF16": torch.bfloat16}  # the stand-in's choice
    for dtype, precision in wanted.items():
        gemma = comfy.node("GemmaLoader", model_name=BUNDLED, device="auto", dtype=dtype)
        assert gemma.encoder.dtype == precision


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_said(comfy: Comfy) -> None:
    with pytest.raises(ValueError, match="The device cuda is not there"):
        comfy.node("GemmaLoader", model_name=BUNDLED, device="cuda")
