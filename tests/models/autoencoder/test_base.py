"""Scaling, size checks and independence of the batch, for any autoencoder."""

import pytest
import torch
from torch import Tensor, nn

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig


class Halving(Autoencoder):
    """Raw latents are every second pixel; remembers the batch sizes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.scaling_factor, self.shift_factor = 4.0, 0.25
        self.latent_channels, self.downsample_factor = 3, 2
        self.batches: list[int] = []

    def raw_encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.batches.append(len(images))
        return images[..., ::2, ::2]

    def raw_decode(self, latents: Tensor) -> Tensor:
        self.batches.append(len(latents))
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_latents_are_shifted_then_scaled_and_back() -> None:
    model, images = Halving(), torch.rand(3, 3, 4, 6)
    latents = model.encode(images)
    torch.testing.assert_close(latents, (images[..., ::2, ::2] - 0.25) * 4)
    torch.testing.assert_close(model.decode(latents)[..., ::2, ::2], images[..., ::2, ::2])


@pytest.mark.parametrize(("training", "batches"), [(False, [1, 1, 1]), (True, [3])])
def test_images_run_one_by_one_on_a_cpu_unless_training(training: bool, batches: list[int]) -> None:
    model = Halving().train(training)
    model.encode(torch.rand(3, 3, 4, 4))
    assert model.batches == batches


def test_an_empty_batch_passes() -> None:
    assert Halving().eval().encode(torch.empty(0, 3, 4, 4)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(batch: int) -> None:
    model = DCAE(
        DCAEConfig(
            latent_channels=8, encoder_width_list=(8, 16, 32), encoder_depth_list=(0, 1, 1), head_dim=16,
            encoder_block_type=("ResBlock", "ResBlock", "EViTS5_GLU"), decoder_width_list=(8, 16, 32),
            decoder_depth_list=(0, 1, 1), decoder_block_type=("ResBlock", "ResBlock", "EViTS5_GLU"),
        )
    ).eval()  # fmt: skip
    latents, images = torch.randn(batch, 8, 6, 4), torch.randn(batch, 3, 24, 16)
    decoded, encoded = model.decode(latents), model.encode(images)
    for i in range(batch):
        assert torch.equal(decoded[i : i + 1], model.decode(latents[i : i + 1].clone()))
        assert torch.equal(encoded[i : i + 1], model.encode(images[i : i + 1].clone()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 5), "image size 4x5 .* not divisible by 2"),
        ((1, 3, 3, 4), "image size 3x4 .* not divisible by 2"),
        ((1, 3, 0, 4), "image size 0x4"),
        ((1, 1, 4, 4), r"images must be \(B, 3, H, W\), got \(1, 1, 4, 4\)"),
        ((3, 4, 4), r"images must be \(B, 3, H, W\), got \(3, 4, 4\)"),
    ],
)
def test_images_that_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Halving().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 2, 2)])
def test_latents_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must be \(B, 3, h, w\)"):
        Halving().decode(torch.zeros(shape))
