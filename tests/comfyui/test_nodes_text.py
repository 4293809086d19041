"""Texts become the embeddings that SanaPipeline makes of them."""

import torch

from sana import SanaPipeline
from tests.comfyui.conftest import BUNDLED, Comfy


def test_conditionings_are_the_pipelines_embeddings(comfy: Comfy, pipeline: SanaPipeline) -> None:
    gemma = comfy.node("GemmaLoader", model_name=BUNDLED, device="cpu")
    text = "a green square"
    ((embeds, extra),) = comfy.node("SanaTextEncode", text=text, GEMMA=gemma)
    trimmed = pipeline.encode_prompts([text], trim=True)
    length = trimmed.mask.shape[1]
    assert embeds.shape == (1, pipeline.config.text_encoder.model_max_length, trimmed.embeds.shape[2])
    assert torch.equal(embeds[:, :length], trimmed.embeds) and not embeds[:, length:].any()
    assert (
        torch.equal(extra["attention_mask"][:, :length], trimmed.mask) and not extra["attention_mask"][:, length:].any()
    )

    ((embeds, extra),) = comfy.node("GemmaTextEncode", text=text, GEMMA=gemma)
    null = pipeline.encode_prompts([text], null=True)
    assert torch.equal(embeds, null.embeds) and torch.equal(extra["attention_mask"], null.mask)
    assert embeds[:, -1].any()  # padding that the prompt's mask may let be read


def test_a_size_is_noted_in_a_copy(comfy: Comfy) -> None:
    given = [[torch.zeros(1, 2, 3), {"attention_mask": 1}]]
    ((embeds, extra),) = comfy.node("SanaResolutionCond", cond=given, width=512, height=1024)
    assert embeds is given[0][0] and given[0][1] == {"attention_mask": 1}
    assert extra == {"attention_mask": 1, "img_hw": [[1024, 512]], "aspect_ratio": [[2.0]]}
