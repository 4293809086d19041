"""Recipes: what the hash covers, what survives a PNG, what a comparison says."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from sana.pipelines.recipe import Recipe, differences, weights_hash

RECIPE = Recipe(
    prompt="雪山 🌸", negative_prompt="", seed=1, height=64, width=96, num_inference_steps=20, sampler="flow_euler",
    guidance_scale=4.5, pag_scale=1.0, interval_guidance=(0.0, 1.0), flow_shift=3.0, use_resolution_binning=True,
    dtype="fp32", weights="ab", made_with={"torch": "2"},
)  # fmt: skip


def test_every_decisive_entry_changes_the_hash_and_the_rest_does_not():
    for entry in dataclasses.fields(Recipe):
        old = getattr(RECIPE, entry.name)
        new = {
            str: "other", int: 7, float: 0.25, bool: False, tuple: (0.1, 0.9), dict: {"torch": "3"}, type(None): 9,
        }[type(old)]  # fmt: skip
        changed = dataclasses.replace(RECIPE, **{entry.name: new})
        assert (changed.hash == RECIPE.hash) == (entry.name == "made_with"), entry.name


def test_a_recipe_survives_json():
    stored = json.loads(json.dumps(RECIPE.as_dict()))
    assert Recipe.from_dict(stored) == RECIPE and stored["hash"] == RECIPE.hash
    assert not differences(stored, RECIPE.as_dict())


@pytest.mark.parametrize("change", [{"format": 2}, {"seed": None}])
def test_a_strange_recipe_is_named(change):
    stored = RECIPE.as_dict() | change
    stored = {name: value for name, value in stored.items() if value is not None}
    with pytest.raises(ValueError, match="format|seed"):
        Recipe.from_dict(stored)


def test_differences_name_both_values():
    other = dataclasses.replace(RECIPE, seed=2, made_with={"torch": "3"})
    assert differences(RECIPE.as_dict(), other.as_dict()) == [
        "made_with.torch: '2' before, '3' now",
        "seed: 1 before, 2 now",
    ]


def test_the_weights_hash_sees_values_names_dtypes_and_settings():
    layer = nn.Linear(2, 2)
    start = weights_hash([layer], {})
    assert start == weights_hash([layer], {})
    assert weights_hash([layer], {"depth": 2}) != start
    assert weights_hash([nn.Sequential(layer)], {}) != start
    assert weights_hash([nn.Linear(2, 2).to(torch.bfloat16)], {}) != start
    with torch.no_grad():
        layer.bias[0] += 1e-6
    assert weights_hash([layer], {}) != start


def test_hashes_and_recipes_of_older_pictures_stay():
    """The hash was computed before there were optional entries; such a picture is still found done."""
    assert RECIPE.hash == "afe92ecf03768d1095210fed0c1151c6bf9ba0a895e22b7f71bdb71e173afb09"
    later = ("step_cache", "max_text_tokens", "upscale_from", "upscale_strength", "quantization", "text_quantization")
    old = {name: value for name, value in RECIPE.as_dict().items() if name not in (*later, "compile")}
    assert Recipe.from_dict(old) == RECIPE
