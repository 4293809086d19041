"""ComfyUI's MODEL around the transformer, against stand-ins: KSampler's picture, masks, and what is refused."""

import itertools
from typing import Any

import pytest
import torch

from sana import SanaPipeline
from sana.diffusion.flow_euler import times
from tests.comfyui.conftest import BUNDLED, Comfy

K = {"seed": 3, "steps": 3, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
LATENT = {"samples": torch.zeros(1, 32, 4, 6)}
PROMPT = "a red circle"


@pytest.fixture
def comfy(comfy_with_models: Comfy) -> Comfy:
    return comfy_with_models


@pytest.fixture
def gemma(comfy: Comfy) -> Any:
    return comfy.node("GemmaLoader", model_name=BUNDLED, device="cpu")


@pytest.fixture
def model(comfy: Comfy) -> Any:
    return comfy.node("SanaCheckpointLoader", ckpt_name=BUNDLED, model="SanaMS_1600M_P1_D20")


def ksampler(comfy: Comfy, model: Any, positive: Any, negative: Any, **changes: Any) -> torch.Tensor:
    with torch.inference_mode():
        inputs = {"positive": positive, "negative": negative, "latent_image": LATENT}
        return comfy.node("KSampler", model=model, **inputs | K | changes)["samples"]


def test_the_model_is_comfyuis(comfy: Comfy, model: Any) -> None:
    assert type(model).__name__ == "ModelPatcher"
    assert model.model.latent_format.latent_channels == 32
    assert model.model.latent_format.spacial_downscale_ratio == 32
    assert model.model.diffusion_model.dtype == torch.float32


def test_texts_are_read_under_their_own_masks(comfy: Comfy, pipeline: SanaPipeline, gemma: Any, model: Any) -> None:
    positive = comfy.node("SanaTextEncode", text=PROMPT, GEMMA=gemma)
    negative = comfy.node("GemmaTextEncode", text="blue and green and yellow", GEMMA=gemma)
    assert not torch.equal(positive[0][1]["attention_mask"], negative[0][1]["attention_mask"])
    made = ksampler(comfy, model, positive, negative)

    transformer: Any = pipeline.transformer
    latents = torch.randn(1, 32, 4, 6, generator=torch.manual_seed(3))
    grid = times(3, flow_shift=pipeline.config.scheduler.flow_shift)
    with torch.inference_mode():
        for now, following in itertools.pairwise(grid):
            text, null = (
                transformer(latents, now.expand(1) * 1000, embeds[:, None], mask=extra["attention_mask"])
                for ((embeds, extra),) in (positive, negative)
            )
            latents = latents + (following - now) * (null + 4.5 * (text - null))
    torch.testing.assert_close(made, latents / pipeline.autoencoder.scaling_factor, rtol=1e-4, atol=1e-4)


def test_with_equal_masks_ksampler_makes_the_pipelines_picture(
    comfy: Comfy, pipeline: SanaPipeline, gemma: Any, model: Any
) -> None:
    """SanaPipeline reads the negative text under the prompt's mask, so the two agree where both have one length."""
    positive = comfy.node("SanaTextEncode", text=PROMPT, GEMMA=gemma)
    length = int(positive[0][1]["attention_mask"].sum())
    texts = (" ".join(["blue"] * count) for count in range(1, 64))
    text, negative = next(
        (text, found)
        for text in texts
        if int((found := comfy.node("GemmaTextEncode", text=text, GEMMA=gemma))[0][1]["attention_mask"].sum()) == length
    )
    made = ksampler(comfy, model, positive, negative)
    options: dict[str, Any] = {"num_inference_steps": 3, "sampler": "flow_euler", "seed": 3, "negative_prompt": text}
    judged = pipeline(PROMPT, 128, 192, use_resolution_binning=False, output_type="latent", **options)
    torch.testing.assert_close(made, judged / pipeline.autoencoder.scaling_factor, rtol=1e-4, atol=1e-4)


def test_sanasampler_takes_the_same_model(comfy: Comfy, pipeline: SanaPipeline, gemma: Any, model: Any) -> None:
    inputs = {
        "positive": comfy.node("SanaTextEncode", text=PROMPT, GEMMA=gemma),
        "negative": comfy.node("GemmaTextEncode", text="", GEMMA=gemma),
        "latent_image": LATENT,
    }
    options = {"seed": 3, "steps": 2, "cfg": 4.5, "pag": 1.0, "sampler_name": "flow_dpm-solver", "flow_shift": -1.0}
    made = comfy.node("SanaSampler", model=model, **inputs, **options)["samples"]
    judged = pipeline(
        PROMPT, 128, 192, use_resolution_binning=False, output_type="latent", num_inference_steps=2, seed=3
    )
    assert torch.equal(made, judged / pipeline.autoencoder.scaling_factor)
    model.model_options["transformer_options"]["patches"] = {"attn1_patch": [len]}
    model.object_patches["model_sampling"] = object()
    with pytest.raises(ValueError, match="follow the patches patches, model_sampling of this MODEL; use KSampler"):
        comfy.node("SanaSampler", model=model, **inputs, **options)


def test_what_the_network_cannot_use_is_refused(comfy: Comfy, gemma: Any, model: Any) -> None:
    network = model.model.diffusion_model
    x, time, context = torch.zeros(1, 32, 2, 2), torch.zeros(1), torch.zeros(1, 64, 160)
    with pytest.raises(ValueError, match="carries no mask"):
        network(x, time, context=context)
    with pytest.raises(ValueError, match="were joined"):
        network(x, time, context=torch.cat([context, context], 1), attention_mask=torch.ones(1, 64).long())
    with pytest.raises(ValueError, match="control networks"):
        network(x, time, context=context, attention_mask=torch.ones(1, 64).long(), control={"output": []})
    clip = [[torch.zeros(1, 77, 160), {"pooled_output": None}]]  # of ComfyUI's own text encoders
    with pytest.raises(ValueError, match="encode the text with SanaTextEncode"):
        ksampler(comfy, model, clip, clip)
