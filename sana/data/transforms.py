"""Geometry of image tensors: resizing and cropping. Which size an image gets is in `aspect_ratio.py`."""

from torch import Tensor
from torch.nn import functional


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
