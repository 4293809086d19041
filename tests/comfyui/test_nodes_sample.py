"""SanaSampler: seeds, batches, and what it does not follow. Whole pictures are compared in test_workflows."""

import logging
from typing import Any

import pytest
import torch

from sana import SanaPipeline
from sana.diffusion import SAMPLERS
from tests.comfyui.conftest import BUNDLED, Comfy

OPTIONS = {"seed": 3, "steps": 2, "cfg": 4.5, "pag": 1.0, "sampler_name": "flow_euler", "flow_shift": -1.0}


@pytest.fixture
def inputs(comfy: Comfy) -> dict[str, Any]:
    gemma = comfy.node("GemmaLoader", model_name=BUNDLED, device="cpu")
    return {
        "model": comfy.node("SanaCheckpointLoader", ckpt_name=BUNDLED, model="SanaMS_1600M_P1_D20"),
        "positive": comfy.node("SanaTextEncode", text="a red circle", GEMMA=gemma),
        "negative": comfy.node("GemmaTextEncode", text="", GEMMA=gemma),
        "latent_image": {"samples": torch.zeros(1, 32, 4, 6)},
    }


def judged(pipeline: SanaPipeline, **changes: Any) -> torch.Tensor:
    options: dict[str, Any] = {"num_inference_steps": 2, "sampler": "flow_euler", "seed": 3, **changes}
    latents = pipeline("a red circle", 128, 192, use_resolution_binning=False, output_type="latent", **options)
    return latents / pipeline.autoencoder.scaling_factor


def test_picture_i_of_a_batch_has_the_seed_plus_i(comfy: Comfy, pipeline: SanaPipeline, inputs: dict[str, Any]) -> None:
    both = comfy.node("SanaSampler", **inputs | OPTIONS | {"latent_image": {"samples": torch.zeros(2, 32, 4, 6)}})
    assert torch.equal(both["samples"], torch.cat([judged(pipeline), judged(pipeline, seed=4)]))
    last = {"samples": torch.zeros(1, 32, 4, 6), "batch_index": [1]}  # as Latent From Batch gives it
    second = comfy.node("SanaSampler", **inputs | OPTIONS | {"latent_image": last})
    assert torch.equal(second["samples"], both["samples"][1:]) and second["batch_index"] == [1]


def test_the_shift_is_the_models_or_the_one_given(comfy: Comfy, pipeline: SanaPipeline, inputs: dict[str, Any]) -> None:
    own = comfy.node("SanaSampler", **inputs | OPTIONS)["samples"]
    given = comfy.node("SanaSampler", **inputs | OPTIONS | {"flow_shift": 2.0})["samples"]
    assert torch.equal(own, judged(pipeline)) and torch.equal(given, judged(pipeline, flow_shift=2.0))
    assert not torch.equal(own, given)


def test_a_negative_text_with_the_instruction_is_used_and_said(
    comfy: Comfy, inputs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sana"):
        made = comfy.node("SanaSampler", **inputs | OPTIONS | {"negative": inputs["positive"]})["samples"]
        assert "use GemmaTextEncode" in caplog.text
    one = comfy.node("SanaSampler", **inputs | OPTIONS | {"cfg": 1.0})["samples"]
    torch.testing.assert_close(made, one, rtol=1e-4, atol=1e-4)  # away from the prompt itself: guidance cancels out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pag": 0.5}, "pag_guidance_scale 0.5 has no effect"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"seed": 2**63}, "seed"),
        ({"model": object()}, "samples models of SanaCheckpointLoader"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}}, "use EmptySanaLatentImage"),
    ],
)
def test_what_cannot_take_effect_is_one_sentence(
    comfy: Comfy, inputs: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        comfy.node("SanaSampler", **inputs | OPTIONS | changes)
    assert "\n" not in str(raised.value)


def test_the_list_names_the_samplers_of_flow_models(comfy: Comfy) -> None:
    names = comfy.nodes["SanaSampler"].INPUT_TYPES()["required"]["sampler_name"][0]  # type: ignore[attr-defined]
    assert names == [name for name in SAMPLERS if SAMPLERS[name].prediction == "velocity"]
