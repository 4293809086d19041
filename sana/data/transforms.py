"""Geometry of images: resizing and cropping, of tensors and of pictures. Which size an image gets is in
`aspect_ratio.py`.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sana.registry import Registry

TRANSFORMS = Registry("transform", {"default_train": "sana.data.transforms:default_train"})
LARGEST_RESIZED = 400_000_000  # pixels; a picture of one row, scaled to cover a square, has billions


def get_transform(name: str) -> Callable[[Image.Image, int], Tensor]:
    """Returns the function (RGB picture, image size) -> (3, size, size) that `data.transform` names.

    Raises:
        UnknownNameError: there is no such transform.
    """
    transform: Callable[[Image.Image, int], Tensor] = TRANSFORMS[name]
    return transform


def default_train(picture: Image.Image, image_size: int) -> Tensor:
    """Scales the shorter side to `image_size` (bilinear, antialiased) and cuts out the middle square.

    Args:
        picture: RGB.
        image_size: side of the square, in pixels.

    Returns:
        (3, image_size, image_size) float32 in [-1, 1].

    Raises:
        ValueError: the scaled picture would be enormous.
    """
    width, height = picture.size
    if width <= height:
        covering = (int(image_size * height / width), image_size)
    else:
        covering = (image_size, int(image_size * width / height))
    return picture_to_tensor(_resized_crop(picture, covering, (image_size, image_size), Image.Resampling.BILINEAR))


def bucket_transform(picture: Image.Image, height: int, width: int, aspect_ratio_type: str) -> Tensor:
    """Scales a picture so that it just covers its bucket's size, and cuts out the middle: the multi-scale transform.

    Bicubic, or Lanczos where the table is of 2048 pixels and more, antialiased, as officially.

    Args:
        picture: RGB.
        height: of the bucket, in pixels.
        width: of the bucket, in pixels.
        aspect_ratio_type: name of the bucket's table ("ASPECT_RATIO_1024").

    Returns:
        (3, height, width) float32 in [-1, 1].

    Raises:
        ValueError: the scaled picture would be enormous.
    """
    old_width, old_height = picture.size
    if height / old_height > width / old_width:
        covering = (height, int(old_width * height / old_height))
    else:
        covering = (int(old_height * width / old_width), width)
    return picture_to_tensor(_resized_crop(picture, covering, (height, width), bucket_resampling(aspect_ratio_type)))


def bucket_resampling(aspect_ratio_type: str) -> Image.Resampling:
    """Returns the filter that pictures of a table are scaled with: Lanczos from 2048 pixels on, else bicubic."""
    large = any(part.isdigit() and int(part) >= 2048 for part in aspect_ratio_type.split("_"))
    return Image.Resampling.LANCZOS if large else Image.Resampling.BICUBIC


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """Returns an RGB picture as (3, H, W) float32, with 0 .. 255 mapped to -1 .. 1."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def _resized_crop(
    picture: Image.Image, covering: tuple[int, int], crop: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """Scales to `covering`, (height, width), at least the crop's size, and cuts out its middle."""
    height, width = (max(side, least) for side, least in zip(covering, crop, strict=True))  # rounded down by a pixel?
    if height * width > LARGEST_RESIZED:
        raise ValueError(
            f"a picture of {picture.width} x {picture.height} pixels is too narrow: scaled to cover "
            f"{crop[1]} x {crop[0]} it would have {width} x {height}"
        )
    if picture.size != (width, height):
        picture = picture.resize((width, height), resampling)
    # round() goes to the even neighbour, as in torchvision's centre crop
    top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
    return picture.crop((left, top, left + crop[1], top + crop[0]))


def resize_and_crop_tensor(images: Tensor, width: int, height: int) -> Tensor:
    """Scales images so that they cover (height, width), and cuts out the middle.

    Bilinear, without antialiasing, as the released pipeline brings a picture from the generated to the wanted size.

    Args:
        images: (B, C, H, W), floating point.
        width: wanted, in pixels. It comes first, as officially.
        height: wanted, in pixels.

    Returns:
        (B, C, height, width); the very same tensor when it has that size.
    """
    if width < 1 or height < 1:
        raise ValueError(f"Height and width must be at least 1 pixel, not {height} and {width}.")
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    ratio = max(height / old_height, width / old_width)
    # int() as officially; never smaller than the crop, which rounding down could make it by one pixel.
    covering = (max(int(old_height * ratio), height), max(int(old_width * ratio), width))
    resized = functional.interpolate(images, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resized[..., top : top + height, left : left + width].contiguous()


def fit_to_factor(images: Tensor, factor: int) -> Tensor:
    """Brings images to the nearest size whose sides are multiples of an autoencoder's factor.

    The tables of 256 and 512 pixels have sides such as 144 and 304, which an autoencoder of factor 32 cannot encode;
    the pipeline draws such a shape at the same nearest size.

    Args:
        images: (B, C, H, W), floating point.
        factor: of pixels to latents along a side.

    Returns:
        (B, C, H', W'); the very same tensor when its size fits.
    """
    height, width = (max(1, (side + factor // 2) // factor) * factor for side in images.shape[-2:])
    return resize_and_crop_tensor(images, width, height)
