"""Distilled models: one network input for guidance, one to four steps, options that cannot act."""

import pytest
import torch

from sana.pipelines.sprint import SanaSprintPipeline
from tests.parity.runners.pipeline import build_pipeline
from tests.tiny_model import recorded_case

SHORT = {"height": 64, "width": 64, "use_resolution_binning": False, "progress_bar": False, "output_type": "latent"}


@pytest.fixture(scope="module")
def sprint() -> SanaSprintPipeline:
    return build_pipeline(recorded_case("e2e/sprint_2"), SanaSprintPipeline)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_call_a_step_for_the_whole_batch_and_bitwise_single_runs(sprint, steps):
    calls = []
    handle = sprint.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    together = sprint(["a cat", "a much longer prompt of a dog"], seed=4, num_inference_steps=steps, **SHORT)
    handle.remove()
    assert calls == [2] * steps
    alone = sprint("a much longer prompt of a dog", seed=5, num_inference_steps=steps, **SHORT)
    assert torch.equal(alone[0], together[1])


def test_two_steps_are_the_default_and_their_second_angle_is_the_released_one(sprint):
    angles = []
    sprint("x", seed=1, callback_on_step_end=lambda pipe, step, time, tensors: angles.append(time), **SHORT)
    assert angles == pytest.approx([1.5708, 1.3])
    listed = []
    sprint(
        "x", seed=1, timesteps=[1.5708, 1.3, 0.0],
        callback_on_step_end=lambda pipe, step, time, tensors: listed.append(time), **SHORT,
    )  # fmt: skip
    assert listed == angles


def test_the_guidance_scale_is_an_input_of_the_network(sprint):
    low, high = (sprint("a cat", seed=1, guidance_scale=scale, **SHORT) for scale in (1.0, 8.0))
    assert not torch.equal(low, high)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "blurry"}, "negative_prompt cannot take effect"),
        ({"pag_scale": 2.0}, "cannot take effect"),
        ({"interval_guidance": (0.1, 1.0)}, "cannot take effect"),
        ({"timesteps": [0.5, 1.0, 0.0]}, "must fall"),
        ({"sampler": "flow_euler"}, "needs a model that predicts velocity"),
    ],
)
def test_options_that_cannot_act_are_errors(sprint, options, message):
    with pytest.raises(ValueError, match=message):
        sprint("x", seed=1, **SHORT, **options)
