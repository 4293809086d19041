"""What a request rejects at once, and what its options mean together."""

import pytest
import torch

from sana.pipelines.request import Request


def test_binning_is_off_with_upscale_from():
    assert Request("a cat").binning
    assert not Request("a cat", use_resolution_binning=False).binning
    assert not Request("a cat", upscale_from=64).binning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give prompt or prompt_embeds"),
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 2, 3)}, "Give prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 2, 3)}, "belong together"),
        ({"prompt": "x", "output_type": "jpg"}, "output_type must be one of"),
        ({"prompt": "x", "pag_scale": 0.5}, "has no effect"),
        ({"prompt": "x", "pag_scale": 2.0, "pag_guidance_scale": 3.0}, "two names of one option"),
        ({"prompt": "x", "interval_guidance": (0.9, 0.1)}, "must not begin above its end"),
        ({"prompt": ["x", "y"], "negative_prompt": ["z"]}, "1 negative prompts were given for 2"),
        ({"prompt": "x", "step_cache": -0.1}, "step_cache must be"),
        ({"prompt": "x", "upscale_strength": 0.5}, "without upscale_from"),
        ({"prompt": "x", "upscale_from": True}, "upscale_from must be a whole number"),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Request(**options)
