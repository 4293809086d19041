"""A start from a small picture: sizes, the noise level, the state that the large picture begins with, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sana.diffusion import SAMPLERS
from sana.pipelines.compiled import CompiledPipeline, CompileSettings
from sana.pipelines.inputs import ImageSize
from sana.pipelines.request import Request
from sana.pipelines.upscale import remaining_times, small_size, start_from_small
from tests.pipelines.recorder import StandInRecorder

PROMPTS = ["a cat", "portrait of an old fisherman by the sea, oil painting", "雪山日出"]
STEPS = 4
SMALL = {"num_inference_steps": STEPS, "progress_bar": False}
LARGE = {**SMALL, "height": 128, "width": 128, "upscale_from": 64, "upscale_strength": 0.6}
FACTOR = 32


@given(
    height=st.integers(2, 128), width=st.integers(2, 128), part=st.floats(0.1, 0.7), factor=st.sampled_from([8, 32, 64])
)
def test_the_small_picture_has_the_area_and_the_shape(height, width, part, factor):
    height, width = height * factor, width * factor
    side = max(1, round((height * width) ** 0.5 * part))
    small = small_size(height, width, side, factor)
    scale = side / (height * width) ** 0.5
    for one, whole in zip(small, (height, width), strict=True):
        assert one % factor == 0 and factor <= one <= whole
        assert one == factor or abs(one - whole * scale) <= factor / 2 + 1e-6


@pytest.mark.parametrize("side", [128, 120, 1000])
def test_a_small_picture_that_is_not_smaller_is_refused(side):
    with pytest.raises(ValueError, match=f"upscale_from {side} makes no picture smaller than the 128x128"):
        small_size(128, 128, side, FACTOR)


@pytest.mark.parametrize("name", ["flow_dpm-solver", "flow_euler"])
@given(steps=st.integers(2, 40), strength=st.floats(0.001, 0.999), shift=st.sampled_from([1.0, 3.0, 6.0]))
def test_the_start_is_the_nearest_noise_level_between_the_ends(name, steps, strength, shift):
    times = SAMPLERS[name].times(steps, flow_shift=shift)
    rest = remaining_times(times, strength)
    assert 2 <= len(rest) < len(times)
    assert torch.equal(rest, times[-len(rest) :])
    assert abs(float(rest[0]) - strength) <= min(abs(float(one) - strength) for one in times[1:-1]) + 1e-7


def test_one_step_is_refused(pipeline):
    with pytest.raises(ValueError, match="at least 2 num_inference_steps"):
        pipeline("a cat", seed=1, **(LARGE | {"num_inference_steps": 1}))


@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler"])
def test_the_large_picture_begins_between_the_small_one_and_noise(pipeline, sampler):
    """By hand: the plain small picture, decoded, enlarged, encoded, and noise drawn after the small picture's."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipeline("a cat", seed=5, sampler=sampler, **LARGE)
    hook.remove()
    times = SAMPLERS[sampler].times(STEPS, flow_shift=pipeline.config.scheduler.flow_shift)
    rest = times[1:][(times[1:-1] - 0.6).abs().argmin() :]
    assert len(seen) == STEPS + len(rest) - 1
    state = seen[STEPS]
    small = pipeline("a cat", height=64, width=64, seed=5, use_resolution_binning=False, sampler=sampler, **SMALL)
    enlarged = F.interpolate(small, (128, 128), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        encoded = pipeline.autoencoder.encode(enlarged)
    generator = torch.Generator().manual_seed(5)
    torch.randn((pipeline.autoencoder.latent_channels, 2, 2), generator=generator)
    noise = torch.randn(encoded.shape[1:], generator=generator)
    wanted = (1 - rest[0]) * encoded[0] + rest[0] * noise
    assert state.shape[-2:] == (4, 4)
    torch.testing.assert_close(state[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler"])
@pytest.mark.parametrize("pag_scale", [1.0, 1.5])
def test_image_i_of_a_batch_is_its_single_run_bitwise(pipeline, sampler, pag_scale):
    options = {**LARGE, "height": 96, "width": 128, "sampler": sampler, "pag_scale": pag_scale}
    together = pipeline(PROMPTS, seed=11, **options)
    assert together.shape == (3, 3, 96, 128)
    for index, prompt in enumerate(PROMPTS):
        alone = pipeline(prompt, generator=[torch.Generator().manual_seed(11 + index)], **options)
        assert torch.equal(alone[0], together[index]), f"image {index} differs from its single run"


def test_the_small_picture_and_its_strength_matter(pipeline):
    pictures = [
        pipeline("a cat", seed=3, **(LARGE | change))
        for change in ({}, {"upscale_strength": 0.9}, {"upscale_from": 32}, {"upscale_from": None} | NO_STRENGTH)
    ]
    for index, one in enumerate(pictures):
        assert all(not torch.equal(one, other) for other in pictures[:index])


NO_STRENGTH = {"upscale_strength": None, "use_resolution_binning": False}


def test_the_very_size_is_made_although_binning_is_on(pipeline):
    """The model was trained at 64 px; binning would make that and enlarge it."""
    latents = pipeline("a cat", seed=3, output_type="latent", **LARGE)
    assert latents.shape[-2:] == (128 // FACTOR, 128 // FACTOR)
    (picture,) = pipeline("a cat", seed=3, output_type="pil", **LARGE)
    assert picture.size == (128, 128)


def test_a_callback_sees_the_steps_of_both_pictures_and_may_stop_them(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape[-2:])))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        pipeline("a cat", seed=1, callback_on_step_end=look, **(LARGE | {"upscale_strength": 0.9}))
    assert seen == [(0, (2, 2)), (1, (2, 2)), (2, (2, 2)), (3, (2, 2)), (0, (4, 4)), (1, (4, 4))]


def test_every_image_is_encoded_with_its_own_generator(pipeline, monkeypatch):
    """Autoencoders that sample a posterior must not mix the random numbers of images."""
    given, encode = [], pipeline.autoencoder.encode
    monkeypatch.setattr(
        pipeline.autoencoder, "encode", lambda image, generator: given.append(generator) or encode(image, generator)
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pipeline(PROMPTS[:2], generator=generators, **LARGE)
    assert given == generators


def test_captured_loops_give_the_same_picture(pipeline, monkeypatch):
    wanted = pipeline(PROMPTS[:2], seed=4, **LARGE)
    recorder = StandInRecorder()
    monkeypatch.setattr(pipeline, "_compiled", CompiledPipeline(pipeline, CompileSettings("graph"), recorder))
    torch.testing.assert_close(pipeline(PROMPTS[:2], seed=4, **LARGE), wanted, rtol=0, atol=1e-5)
    assert len(recorder.recordings) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upscale_from": None}, "upscale_strength cannot take effect without upscale_from"),
        ({"upscale_from": 0}, "upscale_from must be a whole number"),
        ({"upscale_from": 64.0}, "upscale_from must be a whole number"),
        ({"upscale_strength": 0.0}, "between 0 and 1, ends excluded"),
        ({"upscale_strength": 1}, "between 0 and 1, ends excluded"),
        ({"upscale_strength": float("nan")}, "upscale_strength must be a finite number"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "latents and upscale_from were both given"),
    ],
)
def test_what_cannot_take_effect_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Request("a cat", **(LARGE | change))


@pytest.mark.parametrize("name", ["dpm-solver", "sa-solver", "scm"])
def test_samplers_of_other_processes_are_refused(pipeline, name):
    size = ImageSize(128, 128, 128, 128)
    with pytest.raises(ValueError, match="upscale_from works with samplers of the flow"):
        start_from_small(pipeline, Request("a cat", **LARGE), SAMPLERS[name], size, None)
