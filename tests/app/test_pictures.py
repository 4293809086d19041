"""The folder of pictures: bounded, unguessable, gone afterwards, with recipes in the files."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from app.pictures import PictureFolder, picture_name
from sana.pipelines.images import read_recipe
from sana.pipelines.recipe import Recipe

RECIPE = Recipe(
    prompt="a red/../circle 🍋",
    negative_prompt="",
    seed=7,
    height=8,
    width=8,
    num_inference_steps=2,
    sampler="flow_euler",
    guidance_scale=4.5,
    pag_scale=1.0,
    interval_guidance=(0.0, 1.0),
    flow_shift=3.0,
    use_resolution_binning=True,
    dtype="fp32",
    weights="0" * 32,
)


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (8, 8), (200, 30, 40))


def test_a_kept_picture_holds_its_recipe(image: Image.Image) -> None:
    folder = PictureFolder()
    picture = folder.keep(image, RECIPE)
    assert read_recipe(picture.path) == RECIPE.as_dict()
    with Image.open(picture.path) as stored:
        assert stored.tobytes() == image.tobytes()
    assert picture.path.name == picture_name(RECIPE)
    assert picture.path.parent.parent == folder.path and len(picture.path.parent.name) >= 32
    folder.close()
    assert not folder.path.exists()


def test_names_are_safe_everywhere() -> None:
    for prompt in ("a red/../circle 🍋", "x" * 4000, "...", "猫", "CON", "\n"):
        name = picture_name(replace(RECIPE, prompt=prompt))
        assert name.isascii() and name.endswith(".png") and len(name) < 100 and not set(name) & set("/\\ :*?\n")


def test_the_oldest_goes_when_there_are_too_many(image: Image.Image) -> None:
    folder = PictureFolder(kept=3)
    pictures = [folder.keep(image, replace(RECIPE, seed=seed)) for seed in range(5)]
    assert [picture.path.is_file() for picture in pictures] == [False, False, True, True, True]
    assert len(list(folder.path.iterdir())) == 3
    folder.close()


def test_an_output_folder_keeps_every_picture(image: Image.Image, tmp_path: Path) -> None:
    folder = PictureFolder(kept=1, output=str(tmp_path / "new/pictures"))
    for seed in range(3):
        folder.keep(image, replace(RECIPE, seed=seed))
    folder.close()
    kept = sorted((tmp_path / "new/pictures").iterdir())
    assert [(read_recipe(path) or {})["seed"] for path in kept] == [0, 1, 2]


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        PictureFolder(output=str(tmp_path / "file/pictures"))
