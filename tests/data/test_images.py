"""Decoding image files: every mode against Pillow's own drawing of it, and everything that can be wrong with a file."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sana.data.images import get_reader, image_size, read_image, read_pixels
from sana.data.sample import BrokenSampleError

WIDTH, HEIGHT = 12, 8


def picture() -> Image.Image:
    """A smooth RGB picture in which every corner differs."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.stack([rows * 30, columns * 20, 255 - rows * 15], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_come_back(kind: str, options: dict, tmp_path) -> None:
    content = encoded(picture(), kind, **options)
    path = tmp_path / "named.jpg"  # the name does not matter
    path.write_bytes(content)
    for source in (content, path, str(path)):
        image = read_image(source, "a")
        assert image.mode == "RGB"
        assert (pixels(image) == pixels(picture())).all()
        assert image_size(source, "a") == (HEIGHT, WIDTH)


def test_jpeg_comes_back_nearly() -> None:
    image = read_image(encoded(picture(), "JPEG", quality=100, subsampling=0), "a")
    assert abs(pixels(image) - pixels(picture())).max() <= 3


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    assert abs(pixels(read_image(encoded(red, "JPEG", quality=100), "a")) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_black_and_white_and_palette(mode: str) -> None:
    image = picture().convert(mode)
    assert (pixels(read_image(encoded(image, "PNG"), "a")) == pixels(image.convert("RGB"))).all()


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = pixels(read_image(encoded(Image.fromarray(grey), "PNG"), "a"))
    assert abs(image - (grey / 257)[..., None]).max() <= 1  # 0 .. 65535 -> 0 .. 255
    assert image.max() == 255


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_white(kind: str) -> None:
    image = picture().convert("RGBA")
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, 4:8], alpha[:, 8:] = 128, 255
    image.putalpha(Image.fromarray(alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    actual = pixels(read_image(encoded(image, kind, **options), "a"))
    share = alpha[..., None] / 255
    assert abs(actual - (pixels(picture()) * share + 255 * (1 - share))).max() <= 1


def test_grey_with_alpha_and_a_transparent_palette_entry() -> None:
    grey = Image.merge("LA", (Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)))
    assert (pixels(read_image(encoded(grey, "PNG"), "a")) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (pixels(read_image(encoded(palette, "PNG", transparency=1), "a")) == 255).all()
    assert (pixels(read_image(encoded(palette, "PNG", transparency=0), "a")) == [10, 20, 30]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[kind]
    content = encoded(picture(), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert (pixels(read_image(content, "a")) == pixels(expected)).all()
    assert image_size(content, "a") == (expected.height, expected.width)


def test_senseless_exif_is_passed_over() -> None:
    for exif in (b"Exif\x00\x00nonsense", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff"):
        content = encoded(picture(), "JPEG", exif=exif)
        assert image_size(content, "a") == (HEIGHT, WIDTH)
        assert read_image(content, "a").size == (WIDTH, HEIGHT)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has next to no content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("reader", [image_size, read_image])
def test_a_bomb_is_refused_by_its_header(reader: Callable) -> None:
    with pytest.raises(BrokenSampleError, match="sub/x.png: the image has 100000 x 100000 pixels, more than"):
        reader(png_header(100_000, 100_000), "sub/x.png")
    with pytest.raises(BrokenSampleError, match="more than the 95"):
        reader(encoded(picture(), "PNG"), "x", max_pixels=95)
    assert reader(encoded(picture(), "PNG"), "x", max_pixels=96)


def test_our_limit_counts_and_not_that_of_pillow() -> None:
    assert 2 * Image.MAX_IMAGE_PIXELS < 20_000 * 9_500  # Image.open refuses it
    assert image_size(png_header(20_000, 9_500), "a") == (9_500, 20_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_broken(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    for length in (0, 3, 20, len(content) // 2, len(content) - 40):
        with pytest.raises(BrokenSampleError, match="^k: "):
            read_image(content[:length], "k")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_any_damage_is_an_image_or_a_broken_sample(kind: str) -> None:
    content = encoded(picture(), kind)
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(200):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4)
        try:
            assert read_image(damaged.tobytes(), "k", max_pixels=10_000).mode == "RGB"
        except BrokenSampleError as error:
            broken += 1
            assert error.key == "k"
    assert broken


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF", b"GIF89a" + bytes(50), b"<svg/>", b"BM" + bytes(60)])
def test_other_formats_are_not_opened(content: bytes) -> None:
    with pytest.raises(BrokenSampleError, match="not a PNG, JPEG or WebP file"):
        read_image(content, "a")


def test_a_missing_file_is_broken(tmp_path) -> None:
    with pytest.raises(BrokenSampleError, match="No such file"):
        read_image(tmp_path / "a.png", "a")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pixels_are_those_of_the_picture(tmp_path, mode, suffix, orientation):
    if mode == "CMYK" and suffix != "JPEG":
        pytest.skip("no such file")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    Image.fromarray(pixels).resize((140, 90)).convert(mode).save(path, suffix, exif=exif)
    expected = torch.from_numpy(np.array(read_image(path, "k"))).permute(2, 0, 1)
    for source in (path, path.read_bytes()):
        found = read_pixels(source, "k")
        assert found.dtype == torch.uint8 and torch.equal(found, expected)
    with pytest.raises(BrokenSampleError, match="more than the 100"):
        read_pixels(path, "k", max_pixels=100)


def test_pixels_of_a_broken_file_are_refused_as_the_picture_is(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    for read in (read_image, read_pixels):
        with pytest.raises(BrokenSampleError, match="truncated"):
            read(path, "k")
    with pytest.raises(BrokenSampleError):
        read_pixels(tmp_path / "missing.jpg", "k")
    with pytest.raises(ValueError, match=r"exact, fast"):
        get_reader("fastest")
