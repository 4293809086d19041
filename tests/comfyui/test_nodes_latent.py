"""Sizes: the tables and empty latents."""

import pytest
import torch

from comfyui.nodes_latent import EmptyDCAELatentImage, EmptySanaLatentImage, SanaResolutionSelect


@pytest.mark.parametrize("node", [EmptySanaLatentImage, EmptyDCAELatentImage])
def test_an_empty_latent_has_the_size_rounded_down(node: type[EmptySanaLatentImage]) -> None:
    (latent,) = node().generate(width=1000, height=520, batch_size=3)
    assert latent["samples"].shape == (3, 32, 16, 31)
    assert not torch.count_nonzero(latent["samples"])


def test_a_side_below_a_latent_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 pixels a side, not 16 x 512"):
        EmptySanaLatentImage().generate(16, 512)


@pytest.mark.parametrize(
    ("model", "ratio", "size"),
    [
        ("1024px", "1.00", (1024, 1024)),
        ("1024px", "0.25", (512, 2048)),
        ("2K", "1.46", (2432, 1664)),
        ("SanaMS_1600M_P1_D20_4K", "4.00", (8192, 2048)),
        ("512px", "0.57", (384, 672)),
    ],
)
def test_width_and_height_are_the_released_nodes(model: str, ratio: str, size: tuple[int, int]) -> None:
    assert SanaResolutionSelect().get_res(model, ratio) == size
