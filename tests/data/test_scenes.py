"""Scenes: captions say what is there, held-out combinations stay out, drawing is exact."""

import itertools
from collections import Counter

import numpy as np
import pytest

from sana.data.scenes import (
    CELL,
    COUNT_WORDS,
    GRID,
    KINDS,
    Scene,
    SceneObject,
    combinations,
    draw_scene,
    is_held_out,
    plural,
    sample_scene,
    scenes,
)
from sana.data.sprites import BACKGROUNDS, COLOURS, NOUNS, SHAPES


def draw(split, count=600, seed=0):
    return list(itertools.islice(scenes(seed, split=split), count))


def test_the_stream_is_a_function_of_its_seed():
    assert draw("train", 20, seed=3) == draw("train", 20, seed=3)
    assert draw("train", 20, seed=3) != draw("train", 20, seed=4)


def test_training_scenes_hold_no_held_out_combination_of_nouns_or_of_noun_and_colour():
    for scene in draw("train", 2000):
        nouns = {item.noun for item in scene.objects}
        assert not any(is_held_out(a, b) for a, b in itertools.combinations(nouns, 2))
        assert not any(is_held_out(item.noun, item.colour) for item in scene.objects if item.colour)


@pytest.mark.parametrize("kind", ["two", "position", "two_and_one", "colour"])
def test_unseen_scenes_are_about_a_held_out_combination(kind):
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert is_held_out(*combinations(sample_scene(rng, kind=kind, split="unseen"))[0])


def test_about_one_combination_in_eight_is_held_out():
    pairs = list(itertools.combinations(NOUNS, 2))
    assert 0.08 < sum(is_held_out(a, b) for a, b in pairs) / len(pairs) < 0.16
    assert is_held_out("owl", "bus") == is_held_out("bus", "owl")
    assert any(is_held_out(shape, colour) for shape in SHAPES for colour in COLOURS)


def test_captions_name_every_object_with_its_count_colour_and_background():
    for scene in draw("any"):
        for (noun, colour), count in Counter((item.noun, item.colour) for item in scene.objects).items():
            words = [COUNT_WORDS[count]] if count > 1 else []
            assert " ".join([*words, *filter(None, [colour]), plural(noun) if count > 1 else noun]) in scene.caption
        assert (scene.background == "white") or f"on a {scene.background} background" in scene.caption


def test_positions_in_pixels_agree_with_the_relation():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = sample_scene(rng, kind="position")
        first, second = scene.objects
        assert {
            "to the left of": first.column < second.column and first.row == second.row,
            "to the right of": first.column > second.column and first.row == second.row,
            "above": first.row < second.row and first.column == second.column,
            "below": first.row > second.row and first.column == second.column,
        }[scene.relation]


def test_objects_stay_inside_never_overlap_and_never_stand_on_their_own_colour():
    for scene in draw("any"):
        taken = np.zeros((GRID, GRID), int)
        for item in scene.objects:
            assert 0 <= item.row <= GRID - item.cells and 0 <= item.column <= GRID - item.cells
            taken[item.row : item.row + item.cells, item.column : item.column + item.cells] += 1
            assert item.colour != scene.background
        assert taken.max() == 1


def test_drawing_fills_the_background_and_only_the_boxes_of_the_objects():
    scene = Scene("single", "", "pink", (SceneObject("star", "blue", 2, 3, 5),))
    image = draw_scene(scene)
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8
    changed = (image != BACKGROUNDS["pink"]).any(-1)
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 3 * CELL and rows.max() < 5 * CELL
    assert columns.min() >= 5 * CELL and columns.max() < 7 * CELL
    assert tuple(image[4 * CELL + 4, 6 * CELL]) == COLOURS["blue"]


def test_plurals():
    expected = {"cat": "cats", "butterfly": "butterflies", "cross": "crosses", "octopus": "octopuses", "fox": "foxes"}
    assert {noun: plural(noun) for noun in expected} == expected


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="kind is 'three'"):
        sample_scene(np.random.default_rng(0), kind="three")
    with pytest.raises(ValueError, match="split is 'test'"):
        sample_scene(np.random.default_rng(0), split="test")
    assert set(KINDS) >= {"single", "two", "count", "colour", "position"}
