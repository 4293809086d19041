"""Pictures, PNG files and sheets: against torchvision, against Pillow reading back, and after faults half way."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.utils import save_image

from sana.pipelines import images as module
from sana.pipelines.images import contact_sheet, png_bytes, read_recipe, save_png, to_pil

RECIPE = {
    "prompt": "猫 🐈‍⬛ et chât\nline two",
    "seed": 2**62 + 1,
    "guidance": 4.5,
    "hash": "ab",
    "nested": {"ключ": [1, None]},
}


def test_pictures_equal_those_of_torchvision(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 12) * 3 - 1.5
    for one, picture in zip(images, to_pil(images), strict=True):
        save_image(one, tmp_path / "x.png", normalize=True, value_range=(-1, 1))
        theirs = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
        assert np.abs(np.asarray(picture).astype(int) - theirs).max() <= 1  # ties and float order
        assert picture.size == (12, 8)


def test_levels_are_nearest() -> None:
    values = torch.tensor([-9.0, -1.0, -0.5, 0.002, 1.0, 9.0]).expand(1, 3, 1, 6)
    assert np.asarray(to_pil(values)[0])[0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        to_pil(torch.zeros(1, 4, 2, 2))


def test_a_recipe_comes_back_unchanged(tmp_path: Path) -> None:
    picture = to_pil(torch.rand(3, 4, 4))[0]
    save_png(picture, tmp_path / "猫🐈.png", RECIPE)
    assert read_recipe(tmp_path / "猫🐈.png") == RECIPE
    with Image.open(tmp_path / "猫🐈.png") as image:
        assert image.text["Description"] == RECIPE["prompt"]
        assert np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("recipe", [None, {"prompt": "a \ud83d cat"}])
def test_the_bytes_of_a_picture_are_those_of_its_file(tmp_path: Path, recipe: dict[str, str] | None) -> None:
    picture = Image.effect_noise((200, 300), 80).convert("RGB")
    save_png(picture, tmp_path / "x.png", recipe)
    assert png_bytes(picture, recipe) == (tmp_path / "x.png").read_bytes()


def test_a_lone_surrogate_survives(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png", {"prompt": "a \ud83d b"})
    assert read_recipe(tmp_path / "x.png") == {"prompt": "a \ud83d b"}


def test_files_without_a_recipe_give_none(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (2, 2)), tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    for name in ("plain.png", "text.png", "empty.png"):
        assert read_recipe(tmp_path / name) is None
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.png")


def test_a_truncated_picture_gives_none(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    save_png(to_pil(torch.rand(3, 64, 64))[0], path, RECIPE)
    content = path.read_bytes()
    for kept in (len(content) // 2, len(content) - 40, 50):
        path.write_bytes(content[:kept])
        assert read_recipe(path) is None, kept


@pytest.mark.parametrize("stored", ["[" * 100_000, "{", "[1]", "NaN", '{"a": ' * 50_000])
def test_a_hostile_recipe_gives_none(tmp_path: Path, stored: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("sana", stored)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=text)
    assert read_recipe(tmp_path / "x.png") is None


def test_a_picture_of_too_many_pixels_gives_none(tmp_path: Path) -> None:
    """The header says 60000 x 60000; nothing of that size is ever made."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "x.png").write_bytes(whole)
    assert read_recipe(tmp_path / "x.png") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (2, 2), (1, 2, 3)), path, {"prompt": "old"})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (2, 2)), path, {"prompt": "new"})
    assert read_recipe(path) == {"prompt": "old"}
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (2, 2)), tmp_path / "x.png")
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_sheet_shows_every_picture_in_its_place(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 0)]
    pictures: list[Image.Image | Path] = [Image.new("RGB", (64, 64), colour) for colour in colours]
    save_png(pictures[1], tmp_path / "green.png")  # type: ignore[arg-type]
    pictures[1] = tmp_path / "green.png"
    sheet = contact_sheet(pictures, [f"caption {index}" for index in range(5)], columns=2, cell=64)
    rows = (sheet.height - 8) // 3
    for index, colour in enumerate(colours):
        assert sheet.getpixel((8 + 32 + index % 2 * 72, 8 + 32 + index // 2 * rows)) == colour
    assert sheet.getpixel((8 + 32 + 72, 8 + 32 + 2 * rows)) == (255, 255, 255)


def test_captions_are_drawn_below_and_stay_in_their_column() -> None:
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    long = "a very long prompt " * 20
    with_text = np.asarray(contact_sheet([picture, picture], [long, ""], columns=2, cell=64))
    assert (with_text[72:, 8:72] < 128).any()
    assert (with_text[:, 75:] > 250).all()
    assert (np.asarray(contact_sheet([picture] * 2)) == 255).all()


def test_a_missing_file_leaves_its_place_empty(tmp_path: Path) -> None:
    sheet = contact_sheet([tmp_path / "none.png", Image.new("RGB", (8, 8))], columns=2, cell=8)
    assert (np.asarray(sheet)[:, :16] == 255).all()


@pytest.mark.parametrize("captions", [["one"], ["one", "two", "three"]])
def test_another_number_of_captions_is_refused(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="one caption each"):
        contact_sheet([Image.new("RGB", (8, 8))] * 2, captions)


@pytest.mark.parametrize("strip", [1, 12, 40, 10**6])
def test_a_picture_in_strips_is_the_whole_one(monkeypatch, strip: int) -> None:
    images = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    kept = images.clone()
    monkeypatch.setattr(module, "STRIP", strip)
    expected = ((images.float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    for layout in (torch.contiguous_format, torch.channels_last):
        pictures = to_pil(images.contiguous(memory_format=layout))
        assert np.array_equal(np.stack([np.asarray(one) for one in pictures]), expected)
    assert torch.equal(images, kept)
    images[1, 2, 8, 11] = float("inf")  # the last strip
    with pytest.raises(ValueError, match="not finite"):
        to_pil(images)
