"""Jobs: what is filled in, checked, estimated, and shown on the way."""

import pytest
import torch

from sana.pipelines.request import Request
from sana.serving.job import Job, JobOptions, _preview_steps


def test_sampler_and_steps_are_those_of_the_pipeline(small):
    request = Job(small, Request("a cat", seed=1)).request
    assert (request.sampler, request.num_inference_steps) == (small.config.scheduler.vis_sampler, 20)
    assert not request.progress_bar


def test_costs_grow_with_pixels_steps_and_branches(small):
    def cost(**options):
        return Job(small, Request("a cat", 64, 64, num_inference_steps=4, **options)).cost

    assert cost(guidance_scale=1.0) == 64 * 64 * (4 + 2)
    assert cost() == 64 * 64 * (8 + 2) and cost(pag_scale=2.0) == 64 * 64 * (12 + 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_images_per_prompt": 2}, "one picture"), ({"callback_on_step_end": print}, "on_step"),
        ({"sampler": "nothing"}, "Unknown sampler"), ({"height": 16}, "height"),
        ({"height": 128, "width": 128, "upscale_from": 64}, "upscale_from"), ({"timesteps": [1.5, 0]}, "Sprint"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_said_before_it_waits(small, options, match):
    with pytest.raises(ValueError, match=match):
        Job(small, Request("a cat", **options))


@pytest.mark.parametrize(
    ("steps", "previews", "expected"), [(20, 3, {5, 10, 15}), (4, 1, {2}), (20, 0, set()), (1, 3, set()), (3, 3, {2})]
)
def test_previews_are_spread_over_the_steps(steps, previews, expected):
    assert _preview_steps(steps, previews) == expected


def test_a_preview_is_where_the_straight_line_of_the_step_ends(small):
    """On a straight path from noise to data, every preview is the data."""
    job = Job(small, Request("a cat", num_inference_steps=4, sampler="flow_euler"), JobOptions(previews=1))
    times = job._sampler.times(4, flow_shift=small.config.scheduler.flow_shift)
    noise, data = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    path = [time * noise + (1 - time) * data for time in times]
    for index in range(3):
        torch.testing.assert_close(job._extrapolated(path[index], path[index + 1], index), data)


def test_telling_steps_changes_no_bit(small):
    request, told = Request("a cat", num_inference_steps=6, seed=2), []
    image = Job(small, request, JobOptions(told.append, previews=2)).run(small)
    assert torch.equal(image, small.generate(request))
    assert [step.done for step in told] == [1, 2, 3, 4, 5, 6] and {step.total for step in told} == {6}
    assert [step.done for step in told if step.preview is not None] == [2, 4]
    assert told[1].preview.shape == image.shape
