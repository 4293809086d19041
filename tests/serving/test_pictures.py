"""Files of finished pictures: what is in them, and the model's public name."""

import io

import pytest
from PIL import Image

from sana.pipelines.recipe import Recipe
from sana.pipelines.request import Request
from sana.serving.job import Job
from sana.serving.pictures import as_png, model_name, recipe_of


def test_a_png_holds_the_picture_and_its_recipe(small):
    job = Job(small, Request("a cat", 64, 96, seed=4, num_inference_steps=3, pag_scale=2.0))
    recipe = recipe_of(small, job, "public")
    picture = Image.effect_noise((96, 64), 50).convert("RGB")
    opened = Image.open(io.BytesIO(as_png(picture, recipe)))
    assert opened.tobytes() == picture.tobytes() and opened.text["Description"] == "a cat"
    stored = recipe.as_dict()
    assert Recipe.from_dict(stored).hash == recipe.hash == stored["hash"]
    assert (recipe.height, recipe.width, recipe.seed, recipe.pag_scale, recipe.negative_prompt) == (64, 96, 4, 2.0, "")
    assert recipe.made_with["model"] == "public" and "model_path" not in recipe.made_with


def test_a_picture_without_a_recipe(small):
    assert Image.open(io.BytesIO(as_png(Image.new("RGB", (8, 8))))).size == (8, 8)


@pytest.mark.parametrize(
    ("source", "name"),
    [("/srv/models/mine/", "mine"), ("hf://owner/repo/model.pth", "model"), ("owner/repo", "repo"), (None, "sana")],
)
def test_models_are_named_without_their_place(small, monkeypatch, source, name):
    monkeypatch.setattr(small, "model_path", source)
    assert model_name(small) == name
