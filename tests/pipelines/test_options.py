"""The options of a list of pictures: what reaches a request, and what is refused with the nearest known value."""

import pytest

from sana.pipelines.options import InferenceOptions


def test_every_option_of_a_call_reaches_the_request():
    options = InferenceOptions(
        cfg_scale=3.0, pag_scale=2.0, interval_guidance=[0.1, 0.9], step=7, sampling_algo="flow_euler",
        step_cache=0.2, max_text_tokens=24, upscale_from=256, upscale_strength=0.4,
    )  # fmt: skip
    request = options.request(["a", "b"], seed=[1, 2])
    assert (request.prompt, request.seed) == (["a", "b"], [1, 2])
    assert (request.guidance_scale, request.pag, request.interval_guidance) == (3.0, 2.0, (0.1, 0.9))
    assert (request.num_inference_steps, request.sampler) == (7, "flow_euler")
    assert (request.step_cache, request.max_text_tokens) == (0.2, 24)
    assert (request.upscale_from, request.upscale_strength, request.binning) == (256, 0.4, False)
    plain = InferenceOptions(use_resolution_binning=False)
    assert not plain.binning and not plain.request(["a"]).binning
    assert InferenceOptions().binning and InferenceOptions().request(["a"]).binning


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantization", "int-8", "quantization must be one of none, int8, .* Did you mean 'int8'"),
        ("text_quantization", "nf5", "text_quantization must be one of .* Did you mean 'nf4'"),
        ("offload", "sequence", "offload must be one of none, model, .* Did you mean 'sequential'"),
        ("compile", "regionl", "compile must be one of off, regional, .* Did you mean 'regional'"),
        ("max_vram", "8", "has no unit"),
        ("max_vram", "lots", "max_vram must be an amount of memory"),
        ("vae_tiling", 8, "vae_tiling must be a finite number from 64"),
        ("step_cache", -1.0, "step_cache must be"),
        ("max_text_tokens", 0, "max_text_tokens must be"),
        ("upscale_from", -1, "upscale_from must be"),
        ("upscale_strength", 0.5, "without upscale_from"),
    ],
)
def test_unknown_values_are_named_with_the_nearest(name, value, message):
    with pytest.raises(ValueError, match=message):
        InferenceOptions(**{name: value})


def test_a_plan_chooses_the_side_of_its_tiles():
    with pytest.raises(ValueError, match="vae_tiling needs the side of a tile beside max_vram"):
        InferenceOptions(max_vram="8GB", vae_tiling=True)
    assert InferenceOptions(max_vram="8GB", vae_tiling=512).vae_tiling == 512


def test_the_ablation_changes_one_option():
    assert InferenceOptions().with_value("step", 3.0).step == 3
    assert InferenceOptions(offload="model").with_value("cfg_scale", 2.0) == InferenceOptions(
        offload="model", cfg_scale=2.0
    )
    with pytest.raises(ValueError, match="whole numbers"):
        InferenceOptions().with_value("seed", 0.5)
