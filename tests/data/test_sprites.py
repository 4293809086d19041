"""Sprites: nouns by Unicode name, boxes with margins, colours."""

import unicodedata

import numpy as np
import pytest

from sana.data import sprites


def test_there_are_at_least_forty_nouns_and_each_once():
    assert len(sprites.NOUNS) >= 40
    assert len(set(sprites.NOUNS)) == len(sprites.NOUNS)


def test_nouns_of_emoji_are_their_unicode_names():
    assert sprites.unicode_noun("🐸") == "frog"
    for noun, emoji in sprites.EMOJI_BY_NOUN.items():
        assert unicodedata.name(emoji).lower() in (noun, f"{noun} face")


@pytest.mark.parametrize("noun", ["owl", "ring", "triangle"])
@pytest.mark.parametrize("size", [64, 96, 192])
def test_a_sprite_fills_its_box_but_keeps_a_margin(noun, size):
    alpha = sprites.sprite(noun, "red" if noun in sprites.SHAPES else None, size)[..., 3]
    assert alpha.shape == (size, size)
    rows, columns = np.nonzero(alpha > 0.5)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 0.8 * size <= extent < size
    assert alpha[0].max() == alpha[-1].max() == 0


def test_a_shape_has_the_named_colour_and_a_ring_has_a_hole():
    ring = sprites.sprite("ring", "purple", 128)
    assert ring[64, 64, 3] == 0
    np.testing.assert_allclose(np.median(ring[ring[..., 3] > 0.99][:, :3], axis=0), sprites.COLOURS["purple"])


def test_the_bundled_font_draws_every_emoji_differently_and_in_colour():
    drawn = {noun: sprites.sprite(noun, None, 64) for noun in sprites.EMOJI_BY_NOUN}
    pictures = {array.tobytes() for array in drawn.values()}
    assert len(pictures) == len(drawn)
    assert all((array[..., 3] > 0).mean() > 0.15 for array in drawn.values())
    colourful = [np.ptp(array[array[..., 3] > 0.9][:, :3], axis=1).max() > 20 for array in drawn.values()]
    assert sum(colourful) >= len(drawn) - 1  # the soccer ball is black and white
