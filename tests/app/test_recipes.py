"""Recipes of the page: hostile files are one sentence, and a recipe of a stranger's machine names no folder."""

import json
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from app.options import DemoOptions
from app.recipes import MAX_BYTES, Settings, read_dropped, restore_fields, what_differs
from app.styles import load_styles
from app.wishes import Limits, WishError
from sana.pipelines.images import save_png
from sana.pipelines.options import InferenceOptions
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.app.test_pictures import RECIPE as SMALL

RECIPE = replace(SMALL, prompt="a red circle", width=256, height=256)


@pytest.fixture(scope="module")
def limits(bundled: SanaPipeline) -> Limits:
    return Limits.of(bundled, DemoOptions(), load_styles())


@pytest.fixture
def png(tmp_path: Path) -> Path:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECIPE.as_dict())
    return tmp_path / "a.png"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_text(path: Path, text: str) -> Path:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("sana", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunk)
    return path


def test_a_dropped_picture_gives_its_recipe(png: Path) -> None:
    assert read_dropped(png) == RECIPE


def test_a_picture_without_recipe_and_a_file_that_is_none(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png", format="JPEG")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, says in (("plain", "holds no recipe"), ("photo", "is no PNG"), ("empty", "is no PNG"), ("gone", "again")):
        with pytest.raises(WishError, match=says) as error:
            read_dropped(tmp_path / f"{name}.png")
        assert str(tmp_path) not in str(error.value)


def test_a_truncated_picture_is_damaged(png: Path) -> None:
    whole = png.read_bytes()
    for length in (whole.index(b"IDAT"), len(whole) // 2, 60):
        png.write_bytes(whole[:length])
        with pytest.raises(WishError, match="damaged"):
            read_dropped(png)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[" * 50_000, "3", '"text"', "{}", '{"format": 2}', '{"format": 1}',
        json.dumps({**RECIPE.as_dict(), "interval_guidance": 3}),
        json.dumps({**RECIPE.as_dict(), "interval_guidance": ["a", "b"]}),
    ],
)  # fmt: skip
def test_a_broken_recipe_is_damaged(tmp_path: Path, text: str) -> None:
    with pytest.raises(WishError, match="damaged"):
        read_dropped(with_text(tmp_path / "a.png", text))


def test_a_picture_of_a_billion_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    with pytest.raises(WishError, match="60000 x 60000 pixels"):
        read_dropped(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_a_thousand_damaged_pictures_give_a_recipe_or_a_sentence(png: Path) -> None:
    whole, draw, outcomes = png.read_bytes(), random.Random(0), set()
    names = (b"acTL", b"fcTL", b"tRNS", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"eXIf", b"cHRM", b"IHDR")
    for number in range(1000):
        content = bytearray(whole)
        if number % 2:
            for _ in range(draw.randint(1, 6)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        else:
            content[33:33] = chunk(draw.choice(names), draw.randbytes(draw.randint(0, 40)))
        png.write_bytes(content)
        try:
            read_dropped(png)
            outcomes.add("recipe")
        except WishError as error:
            assert "\n" not in str(error) and "/" not in str(error)
            outcomes.add("sentence")
    assert outcomes == {"recipe", "sentence"}


def test_a_text_that_unpacks_to_a_flood_is_no_recipe(tmp_path: Path) -> None:
    flood = PngImagePlugin.PngInfo()
    flood.add_itxt("sana", "x" * 10**8, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "flood.png", pnginfo=flood)
    with pytest.raises(WishError, match="damaged"):
        read_dropped(tmp_path / "flood.png")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(WishError, match="at most 64 MB"):
        read_dropped(tmp_path / "large.png")


def test_the_fields_are_those_of_the_recipe(limits: Limits) -> None:
    fields = restore_fields(replace(RECIPE, width=352, height=192, pag_scale=0.0), limits)
    expected = {"prompt": "a red circle", "width": 352, "height": 192, "steps": 2, "guidance": 4.5, "seed": 7}
    assert expected.items() <= fields.items()
    assert (fields["aspect"], fields["image_size"], fields["randomise"], fields["number"]) == ("16:9", 256, False, 1)
    assert fields["pag"] == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**6}, {"width": "256"}, {"prompt": None}, {"prompt": {}}, {"num_inference_steps": 10**9},
        {"seed": 2**62}, {"guidance_scale": float("nan")}, {"guidance_scale": None}, {"pag_scale": []},
        {"negative_prompt": 3},
        {"height": 257},
    ],
)  # fmt: skip
def test_a_recipe_of_nonsense_is_one_sentence(limits: Limits, change: dict[str, Any]) -> None:
    with pytest.raises(WishError, match="This page cannot make that picture: ") as error:
        restore_fields(replace(RECIPE, **change), limits)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_what_else_differs_is_named(bundled: SanaPipeline) -> None:
    here = Settings.of(bundled, None).here(bundled, "0" * 32)
    same = replace(RECIPE, **{key: here[key] for key in here})
    assert what_differs(same, here) == []
    other = replace(same, sampler="flow_euler", weights="1" * 32, quantization="int8")
    assert what_differs(other, here) == ["sampler", "quantization", "weights"]
    assert "weights" not in Settings.of(bundled, None).here(bundled, None)


def test_a_recipe_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    options = InferenceOptions(
        model_path=str(tmp_path / "weights/mine.pth"),
        config=str(tmp_path / "mine.yaml"),
        overrides=[f"--vae.vae_pretrained={tmp_path}/vae", "--model.image_size=256"],
    )
    made_with = {
        "model_path": options.model_path,
        "config": options.config,
        "overrides": options.overrides,
        "threads": 1,
    }
    public = Settings(options).public(made_with)
    assert public == {
        "model_path": "mine.pth",
        "config": "mine.yaml",
        "overrides": ["--vae.vae_pretrained=vae", "--model.image_size=256"],
        "threads": 1,
    }


@pytest.mark.parametrize("path", ["hf://owner/repo/a.pth", "owner/repo", "output/model", "https://host/a.pth"])
def test_names_that_say_nothing_of_the_machine_stay(path: str) -> None:
    assert Settings(InferenceOptions(model_path=path)).public({"model_path": path})["model_path"] == path


def test_the_bundled_model_is_what_no_name_means(bundled: SanaPipeline) -> None:
    settings = Settings.of(bundled, None)
    assert settings.public({"model_path": bundled.model_path})["model_path"] is None
