"""Geometry of images: resizing and cropping, of tensors and of pictures. Which size an image gets is in
`aspect_ratio.py`.

Data sets give uint8 images; `normalise_images` alone maps 0 .. 255 to -1 .. 1, on the device that trains.
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
Picture = Image.Image | Tensor  # RGB: one that PIL scales, or (3, H, W) uint8 that torch scales several times as fast
_TENSOR_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # torch knows no Lanczos filter


def get_transform(name: str) -> Callable[[Picture, int], Tensor]:
    """Returns the function (RGB picture, image size) -> (3, size, size) uint8 that `data.transform` names.

    Raises:
        UnknownNameError: there is no such transform.
    """
    transform: Callable[[Picture, int], Tensor] = TRANSFORMS[name]
    return transform


def normalise_images(images: Tensor) -> Tensor:
    """Maps uint8 images, 0 .. 255, to float32 in [-1, 1]; floating images are there already and returned as they are.

    Every device gives the same bits: the divisor is a tensor, since CUDA multiplies by the reciprocal of a number.

    Args:
        images: (..., 3, H, W).

    Returns:
        A contiguous tensor of the same shape.
    """
    if images.is_floating_point():
        return images
    scale = torch.full((), 255.0, device=images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(scale).sub_(0.5).div_(0.5)


def default_train(picture: Picture, image_size: int) -> Tensor:
    """Scales the shorter side to `image_size` (bilinear, antialiased) and cuts out the middle square.

    Args:
        picture: RGB.
        image_size: side of the square, in pixels.

    Returns:
        (3, image_size, image_size) uint8.

    Raises:
        ValueError: the scaled picture would be enormous.
    """
    height, width = picture_size(picture)
    if width <= height:
        covering = (int(image_size * height / width), image_size)
    else:
        covering = (image_size, int(image_size * width / height))
    return _resized_crop(picture, covering, (image_size, image_size), Image.Resampling.BILINEAR)


def bucket_transform(picture: Picture, height: int, width: int, aspect_ratio_type: str) -> Tensor:
    """Scales a picture so that it just covers its bucket's size, and cuts out the middle: the multi-scale transform.

    Bicubic, or Lanczos where the table is of 2048 pixels and more, antialiased, as officially.

    Args:
        picture: RGB.
        height: of the bucket, in pixels.
        width: of the bucket, in pixels.
        aspect_ratio_type: name of the bucket's table ("ASPECT_RATIO_1024").

    Returns:
        (3, height, width) uint8.

    Raises:
        ValueError: the scaled picture would be enormous.
    """
    old_height, old_width = picture_size(picture)
    if height / old_height > width / old_width:
        covering = (height, int(old_width * height / old_height))
    else:
        covering = (int(old_height * width / old_width), width)
    return _resized_crop(picture, covering, (height, width), bucket_resampling(aspect_ratio_type))


def bucket_resampling(aspect_ratio_type: str) -> Image.Resampling:
    """Returns the filter that pictures of a table are scaled with: Lanczos from 2048 pixels on, else bicubic."""
    large = any(part.isdigit() and int(part) >= 2048 for part in aspect_ratio_type.split("_"))
    return Image.Resampling.LANCZOS if large else Image.Resampling.BICUBIC


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """Returns an RGB picture as (3, H, W) uint8; the three colours of a pixel stay together in memory."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)


def picture_size(picture: Picture) -> tuple[int, int]:
    """Returns (height, width) in pixels."""
    return (picture.shape[1], picture.shape[2]) if isinstance(picture, Tensor) else (picture.height, picture.width)


def _resized_crop(
    picture: Picture, covering: tuple[int, int], crop: tuple[int, int], resampling: Image.Resampling
) -> Tensor:
    """Scales to `covering`, (height, width), at least the crop's size, and cuts out its middle."""
    height, width = (max(side, least) for side, least in zip(covering, crop, strict=True))  # rounded down by a pixel?
    old_height, old_width = picture_size(picture)
    if height * width > LARGEST_RESIZED:
        raise ValueError(
            f"a picture of {old_width} x {old_height} pixels is too narrow: scaled to cover "
            f"{crop[1]} x {crop[0]} it would have {width} x {height}"
        )
    # round() goes to the even neighbour, as in torchvision's centre crop
    top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
    if isinstance(picture, Tensor) and resampling in _TENSOR_FILTERS:
        scaled = _resized_tensor(picture, (height, width), resampling)
        return scaled[:, top : top + crop[0], left : left + crop[1]].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if isinstance(picture, Tensor):
        picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    if (old_height, old_width) != (height, width):
        picture = picture.resize((width, height), resampling)
    return picture_to_tensor(picture.crop((left, top, left + crop[1], top + crop[0])))


def _resized_tensor(picture: Tensor, size: tuple[int, int], resampling: Image.Resampling) -> Tensor:
    """Scales (3, H, W) uint8 with antialiasing; at most one (bilinear) or two (bicubic) of 255 levels from PIL."""
    if tuple(picture.shape[1:]) == size:
        return picture
    from torchvision.transforms.v2 import InterpolationMode  # here: it imports Triton
    from torchvision.transforms.v2.functional import resize

    return resize(picture, list(size), InterpolationMode[resampling.name], antialias=True)


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
