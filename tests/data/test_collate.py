"""Samples become batches: shapes, padding, and samples that do not fit together."""

from dataclasses import replace

import pytest
import torch

from sana.data.collate import collate
from sana.data.sample import DataError, Sample


def sample(key: str = "a", tokens: int | None = None, **fields) -> Sample:
    if "latents" not in fields:
        fields.setdefault("image", torch.full((3, 4, 6), float(ord(key[0]))))
    if tokens is not None:
        fields["prompt_embeds"] = torch.rand(tokens, 5, dtype=torch.float16) + 1
    return Sample(key, f"caption of {key}", **fields)


def batch_of(*samples: Sample):
    return collate(samples, [each.key for each in samples], [1.0] * len(samples), epoch=3)


def test_images_are_stacked_in_order() -> None:
    batch = batch_of(sample("a"), sample("b"))
    assert batch.images.shape == (2, 3, 4, 6) and batch.images[:, 0, 0, 0].tolist() == [ord("a"), ord("b")]
    assert (batch.keys, batch.captions, batch.epoch, len(batch)) == (["a", "b"], ["caption of a", "caption of b"], 3, 2)
    assert batch.latents is batch.prompt_embeds is batch.prompt_mask is None
    assert batch.weights.tolist() == [1, 1] and batch.weights.dtype == torch.float32


def test_text_features_are_padded_behind_their_tokens() -> None:
    latents = torch.rand(32, 2, 2)
    first, second = sample("a", 2, latents=latents), sample("b", 4, latents=latents)
    second = replace(second, prompt_mask=torch.tensor([1, 1, 1, 0]))
    batch = batch_of(first, second)
    assert batch.images is None and torch.equal(batch.latents, torch.stack([latents, latents]))
    assert batch.prompt_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]] and batch.prompt_mask.dtype == torch.int64
    assert batch.prompt_embeds.dtype == torch.float16 and not batch.prompt_embeds[0, 2:].any()
    assert torch.equal(batch.prompt_embeds[0, :2], first.prompt_embeds)
    assert torch.equal(batch.prompt_embeds[1], second.prompt_embeds)


def test_moving_keeps_everything_else() -> None:
    batch = batch_of(sample("a", 2), sample("b", 1))
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.weights.device.type, moved.prompt_embeds.device.type} == {"meta"}
    assert moved.prompt_mask.shape == (2, 2) and (moved.keys, moved.epoch) == (batch.keys, 3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (sample("a"), sample("b", image=torch.zeros(3, 6, 4)), "a and b are in one bucket.*(3, 4, 6).*(3, 6, 4)"),
        (sample("a"), sample("b", latents=torch.zeros(1, 2, 3)), "a and b are in one bucket.*None"),
        (sample("a", 2), sample("b"), "text features do not fit"),
        (sample("a", 2), sample("b", prompt_embeds=torch.zeros(2, 7)), "text features do not fit"),
        (sample("a", image=None), sample("b", image=None), "a: .*either an image or latents"),
    ],
)
def test_samples_that_do_not_fit_together(first, second, message) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(").replace(")", r"\)")):
        batch_of(first, second)


def test_loaded_pictures_are_copied_as_they_lie_in_memory() -> None:
    pixels = torch.arange(2 * 4 * 6 * 3).to(torch.uint8).reshape(2, 4, 6, 3)
    batch = batch_of(*(sample(key, image=each.permute(2, 0, 1)) for key, each in zip("ab", pixels, strict=True)))
    assert batch.images.dtype == torch.uint8 and torch.equal(batch.images, pixels.permute(0, 3, 1, 2))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
