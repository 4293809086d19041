"""Pictures made in several calls against those of one: the same bits, whatever is given for each picture."""

import numpy as np
import pytest
import torch

from sana.pipelines.calls import generate_in_calls
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline

SIZE = {"height": 64, "width": 96, "num_inference_steps": 2, "progress_bar": False, "use_resolution_binning": False}
PROMPTS = ["a red square", "two blue circles on green", "a star"]


@pytest.fixture(scope="module")
def pipeline() -> SanaPipeline:
    return SanaPipeline.from_pretrained("asset/models/sana_tiny", device="cpu")


def requests(pipeline: SanaPipeline) -> dict[str, dict]:
    """What may be given, by what it is about."""
    encoded = pipeline.encode_prompts(PROMPTS)
    null = pipeline.encode_prompts(["blurred", "", "dark"], null=True).embeds
    return {
        "seed": {"prompt": PROMPTS, "seed": 3},
        "images": {"prompt": PROMPTS[:2], "num_images_per_prompt": 2, "seed": [5, 1, 9, 4], "output_type": "latent"},
        "negatives": {"prompt": PROMPTS, "negative_prompt": ["blurred", "", "dark"], "seed": 0, "pag_scale": 2.0},
        "embeds": {
            "prompt_embeds": encoded.embeds, "prompt_attention_mask": encoded.mask, "seed": 1,
            "negative_prompt_embeds": null,
        },
        "one null": {
            "prompt_embeds": encoded.embeds, "prompt_attention_mask": encoded.mask, "seed": 1,
            "negative_prompt_embeds": null[:1],
        },
        "latents": {"prompt": PROMPTS, "latents": torch.randn(3, pipeline.autoencoder.latent_channels, 2, 3)},
        "small": {"prompt": PROMPTS, "seed": 2, "upscale_from": 32},
    }  # fmt: skip


@pytest.mark.parametrize("about", ["seed", "images", "negatives", "embeds", "one null", "latents", "small"])
def test_the_bits_are_those_of_one_call(pipeline: SanaPipeline, about: str) -> None:
    request = Request(**SIZE, **requests(pipeline)[about])
    expected = pipeline.generate(request)
    images = len(expected)
    for most in range(1, images + 1):
        assert torch.equal(generate_in_calls(pipeline, request, most), expected), most


def test_one_generator_is_drawn_from_in_the_same_order(pipeline: SanaPipeline) -> None:
    def made(most: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        request = Request(prompt=PROMPTS, num_images_per_prompt=2, generator=generator, **SIZE)
        return generate_in_calls(pipeline, request, most)

    expected = made(6)
    assert torch.equal(made(4), expected) and torch.equal(made(1), expected)
    for option in ({"upscale_from": 32}, {"sampler": "sa-solver"}):
        request = Request(prompt=PROMPTS, generator=torch.Generator(), **SIZE, **option)
        with pytest.raises(ValueError, match="give seed, or a list with one generator for each picture"):
            generate_in_calls(pipeline, request, 2)


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_every_kind_of_output_is_joined(pipeline: SanaPipeline, output_type: str) -> None:
    request = Request(prompt=PROMPTS, seed=0, output_type=output_type, **SIZE)
    parts, whole = generate_in_calls(pipeline, request, 2), pipeline.generate(request)
    assert type(parts) is type(whole) and len(parts) == 3
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(parts, whole, strict=True))


def test_calls_are_even_and_as_many_as_needed(pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    own = type(pipeline).generate
    monkeypatch.setattr(
        type(pipeline), "generate", lambda self, request: sizes.append(request.prompt_count) or own(self, request)
    )
    generate_in_calls(pipeline, Request(prompt=["a"] * 7, seed=0, **SIZE), 3)
    assert sorted(sizes) == [2, 2, 3]


def test_a_plan_with_a_bound_decides() -> None:
    pipeline = SanaPipeline.from_pretrained("asset/models/sana_tiny", device="cpu")
    seen: list[int] = []
    own = pipeline.generate

    def generate(request: Request) -> torch.Tensor:
        seen.append(request.prompt_count)
        return own(request)

    pipeline.generate = generate  # type: ignore[method-assign]

    def made() -> torch.Tensor:
        return pipeline(PROMPTS, seed=0, **SIZE)

    expected = made()
    pipeline.plan(64, 96, 3, use_resolution_binning=False).apply(pipeline)  # no bound
    assert torch.equal(made(), expected) and seen == [3, 3]
    seen.clear()
    pipeline.fit("1GB", 64, 96, 2, use_resolution_binning=False)
    assert torch.equal(made(), expected) and sorted(seen) == [1, 2]
    seen.clear()
    pipeline.fit("1GB", 64, 96, 2, use_resolution_binning=False, split=False)
    assert torch.equal(made(), expected) and seen == [3]
