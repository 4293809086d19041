"""Resizing and cropping, against arithmetic on ramps and against torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from sana.data.transforms import (
    bucket_transform,
    fit_to_factor,
    get_transform,
    normalise_images,
    picture_to_tensor,
    resize_and_crop_tensor,
)

sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides)
def test_any_size_becomes_any_other(old_height: int, old_width: int, height: int, width: int) -> None:
    assert resize_and_crop_tensor(torch.zeros(1, 3, old_height, old_width), width, height).shape == (
        1,
        3,
        height,
        width,
    )


def test_it_is_a_bilinear_resize_and_a_centre_crop() -> None:
    images = torch.rand(2, 3, 16, 24)
    expected = tv.center_crop(tv.resize(images, [20, 30], antialias=False), [20, 14])
    torch.testing.assert_close(resize_and_crop_tensor(images, 14, 20), expected)


def test_the_middle_stays_in_the_middle() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 8, 64)  # columns
    cropped = resize_and_crop_tensor(ramp, 8, 8)
    assert abs(float(cropped.mean())) < 1e-5
    assert cropped.amax() < 0.2


def test_an_image_of_the_wanted_size_is_not_touched() -> None:
    images = torch.rand(1, 3, 5, 7)
    assert resize_and_crop_tensor(images, 7, 5) is images


def test_a_size_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel"):
        resize_and_crop_tensor(torch.zeros(1, 3, 4, 4), 0, 4)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), [(41, 93), (93, 41), (32, 32), (33, 32), (5, 7), (64, 1)])
def test_default_train_is_resize_and_centre_crop(height: int, width: int) -> None:
    expected = v2.Compose(
        [v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize([0.5] * 3, [0.5] * 3)]
    )  # fmt: skip
    actual = normalise_images(get_transform("default_train")(noise(height, width), 32))
    torch.testing.assert_close(actual, expected(noise(height, width)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("table", "resampling"),
    [
        ("ASPECT_RATIO_256", v2.InterpolationMode.BICUBIC),
        ("ASPECT_RATIO_1024", v2.InterpolationMode.BICUBIC),
        ("ASPECT_RATIO_2048", v2.InterpolationMode.LANCZOS),
        ("ASPECT_RATIO_4096_TEST", v2.InterpolationMode.LANCZOS),
    ],
)
def test_a_bucket_is_covered_and_cut(table: str, resampling: v2.InterpolationMode) -> None:
    # (height, width) and the least size of the same ratio, rounded down, that covers 40 x 60
    for size, covering in (((50, 70), [42, 60]), ((70, 50), [84, 60]), ((40, 90), [40, 90]), ((40, 60), [40, 60])):
        resized = v2.functional.resize(noise(*size), covering, resampling)
        expected = picture_to_tensor(v2.functional.center_crop(resized, [40, 60]))
        assert (bucket_transform(noise(*size), 40, 60, table) == expected).all()


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides)
def test_any_picture_fills_any_bucket(old_height: int, old_width: int, height: int, width: int) -> None:
    white = Image.new("RGB", (old_width, old_height), "white")
    assert (bucket_transform(white, height, width, "ASPECT_RATIO_512") == 255).all()  # no black border anywhere


def test_pixels_become_minus_one_to_one() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = picture_to_tensor(Image.fromarray(np.stack([ramp, ramp[::-1], ramp.T], axis=-1)))
    assert pixels.dtype == torch.uint8
    tensor = normalise_images(pixels)
    assert tensor.shape == (3, 16, 16) and tensor.is_contiguous()
    assert normalise_images(tensor) is tensor
    torch.testing.assert_close(tensor[0], torch.linspace(-1, 1, 256).reshape(16, 16))
    assert (tensor[1] == tensor[0].flip(0)).all() and (tensor[2] == tensor[0].T).all()


def test_a_line_is_not_blown_up() -> None:
    line = Image.new("RGB", (20_000_000, 1))
    for transform in (get_transform("default_train"), lambda p, n: bucket_transform(p, n, n, "ASPECT_RATIO_512")):
        with pytest.raises(ValueError, match="20000000 x 1 pixels is too narrow"):
            transform(line, 512)


def test_an_unknown_transform_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Unknown transform 'default_trian'.*default_train"):
        get_transform("default_trian")


def test_images_fit_an_autoencoder() -> None:
    images = torch.rand(2, 3, 304, 208)
    fitted = fit_to_factor(images, 32)
    assert fitted.shape == (2, 3, 320, 224)
    assert fit_to_factor(fitted, 32) is fitted
    assert fit_to_factor(torch.rand(1, 3, 8, 150), 32).shape == (1, 3, 32, 160)
    torch.testing.assert_close(
        fit_to_factor(torch.full((1, 3, 144, 400), 0.25), 32), torch.full((1, 3, 160, 416), 0.25)
    )


def test_uint8_becomes_the_floats_it_always_became() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    expected = pixels.float().div(255).sub(0.5).div(0.5)
    assert torch.equal(normalise_images(pixels), expected)
    batch = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]  # colours of a pixel together, as loaders give
    assert torch.equal(normalise_images(batch), expected[None]) and normalise_images(batch).is_contiguous()


@pytest.mark.gpu
def test_every_device_gives_the_same_floats() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    assert torch.equal(normalise_images(pixels.cuda()).cpu(), normalise_images(pixels))


@pytest.mark.parametrize("size", [(300, 400), (1000, 700), (90, 300), (257, 311)])
@pytest.mark.parametrize("table", ["ASPECT_RATIO_256", "ASPECT_RATIO_2048"])
def test_a_tensor_is_scaled_as_a_picture_within_two_levels(size: tuple[int, int], table: str) -> None:
    picture = noise(*size)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    levels = 0 if "2048" in table else 2  # no Lanczos filter for tensors: PIL scales them
    for exact, fast, limit in (
        (bucket_transform(picture, 128, 192, table), bucket_transform(tensor, 128, 192, table), levels),
        (get_transform("default_train")(picture, 96), get_transform("default_train")(tensor, 96), 1),
    ):
        assert exact.dtype == fast.dtype == torch.uint8 and exact.shape == fast.shape
        assert (exact.int() - fast.int()).abs().max() <= limit
