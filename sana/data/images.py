"""Decoding image files that may be anything: upright RGB pictures, or an error that names the record. No resizing.

PNG, JPEG and WebP are told apart by their first bytes, not by their names, and no other format is opened.
"""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from torch import Tensor

from sana.data.sample import BrokenSampleError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")  # compare in lower case
MAX_PIXELS = 200_000_000
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Source = str | Path | bytes  # a file, or its content
RESIZES = ("exact", "fast")


def get_reader(resize: str) -> "Callable[..., Image.Image | Tensor]":
    """Returns what decodes a picture: the transforms scale each kind by its own library.

    Args:
        resize: "exact": `read_image`, scaled by PIL as officially; "fast": `read_pixels`, scaled by torch in a quarter
            of the time, at most two of 255 levels apart (tables of 2048 pixels and more: by PIL as well).

    Raises:
        ValueError: another name.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; choose one of {', '.join(RESIZES)}.")
    return read_image if resize == "exact" else read_pixels


def image_size(source: Source, key: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns (height, width) in pixels of the upright image, from the header alone.

    Raises:
        BrokenSampleError: not a PNG, JPEG or WebP file, unreadable, or more than `max_pixels` pixels.
    """
    with _broken(key), _opened(source) as file:
        image = _header(file, key, max_pixels)
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def read_image(source: Source, key: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file to an upright RGB picture: turned as EXIF says, transparency over white.

    Args:
        source: path or content of a PNG, JPEG or WebP file; of an animation the first picture.
        key: of the record, for the error.
        max_pixels: a larger image is refused before it is decoded.

    Raises:
        BrokenSampleError: the file cannot be read, is damaged or truncated, or has more than `max_pixels` pixels.
    """
    with _broken(key), _opened(source) as file:
        image = _header(file, key, max_pixels)
        turn = _UPRIGHT.get(_orientation(image))
        image.load()
        picture = _to_rgb(image)
        return picture.transpose(turn) if turn is not None else picture


def read_pixels(source: Source, key: str, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """`read_image` as a tensor: plain JPEG files go through torchvision's decoder, which gives the same pixels faster.

    Args:
        source: path or content of the file.
        key: of the record, for the error.
        max_pixels: a larger image is refused before it is decoded.

    Returns:
        (3, H, W) uint8, the three colours of a pixel together in memory.

    Raises:
        BrokenSampleError: as `read_image`.
    """
    content = source
    if not isinstance(content, bytes):
        with _broken(key), open(content, "rb") as file:
            content = file.read()
    if _is_plain_jpeg(content, key, max_pixels):
        from torchvision.io import ImageReadMode, decode_jpeg  # here: torchvision imports Triton

        with suppress(RuntimeError):  # PIL is more patient with damaged files, or says what is wrong
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return torch.from_numpy(np.array(read_image(content, key, max_pixels=max_pixels))).permute(2, 0, 1)


def _is_plain_jpeg(content: bytes, key: str, max_pixels: int) -> bool:
    """Whether a file is an upright RGB or grey JPEG."""
    if not content.startswith(b"\xff\xd8\xff"):
        return False
    with _broken(key), _opened(content) as file:
        image = _header(file, key, max_pixels)
        return image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == 1


@contextmanager
def _broken(key: str) -> Iterator[None]:
    """Whatever a decoder raises on bad bytes becomes a broken sample; running out of memory stays what it is."""
    try:
        yield
    except (BrokenSampleError, MemoryError):
        raise
    except Exception as error:
        raise BrokenSampleError(key, f"the image cannot be read: {error or type(error).__name__}") from error


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        yield file


def _header(file: BinaryIO, key: str, max_pixels: int) -> ImageFile.ImageFile:
    """Opens by the first bytes. Image.open has a fixed limit of pixels, which would stand in the way of ours."""
    start = file.read(12)
    file.seek(0)
    image: ImageFile.ImageFile
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        image = PngImagePlugin.PngImageFile(file)
    elif start.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.jpeg_factory(file)
    elif start.startswith(b"RIFF") and start[8:] == b"WEBP":
        image = WebPImagePlugin.WebPImageFile(file)
    else:
        raise BrokenSampleError(key, "the image is empty" if not start else "the image is not a PNG, JPEG or WebP file")
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenSampleError(
            key, f"the image has {width} x {height} pixels, more than the {max_pixels} of data.extra.max_pixels"
        )
    return image


def _orientation(image: ImageFile.ImageFile) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where it is missing or unreadable, as viewers do."""
    try:
        if image.format == "PNG":  # its getexif() would decode the image to look for EXIF behind the pixels
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; the upper byte, as 16-bit RGB is read
        return Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")
