"""Resizing and cropping, against arithmetic on ramps and against torchvision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from sana.data.transforms import resize_and_crop_tensor

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
