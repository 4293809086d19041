"""An unlimited captioned data set of drawn scenes: coloured shapes and colour emoji on plain backgrounds.

A scene is data (what, where, how large) with a caption; `draw_scene` turns it into pixels. Objects stand on a lattice
of 32-pixel cells, the cells of an f32 autoencoder, which is what lets a very small model learn them. The pictures of
single objects are in `sprites.py`; how well a model draws scenes is measured by `tools/score_scenes.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sana.data.sprites import BACKGROUNDS, COLOURS, NOUNS, SHAPES, sprite

CELL = 32  # pixels of one lattice cell
GRID = 8  # cells along each side of a 256-pixel scene
KINDS = ("single", "two", "count", "colour", "position", "two_and_one")
KIND_PROBABILITIES = (0.20, 0.16, 0.24, 0.06, 0.24, 0.10)
RELATIONS = ("to the left of", "to the right of", "above", "below")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
SIZE_CELLS = {"small": 2, "": 4, "big": 6}  # of a single object
MULTI_CELLS = 3  # size of each object where there are several
HELD_OUT_PERCENT = 12
NATURAL_COLOURS = {"elephant": "gray", "anchor": "gray"}  # of emoji that would vanish on such a background


@dataclass(frozen=True)
class SceneObject:
    """One object: `noun` (of `NOUNS`), `colour` (of `COLOURS`, shapes only), box side and top left corner in cells."""

    noun: str
    colour: str | None
    cells: int
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A caption and what it describes; `relation` is set for kind "position" (first object RELATION second)."""

    kind: str
    caption: str
    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None


def is_held_out(noun: str, other: str) -> bool:
    """Whether the combination (noun, noun) or (noun, colour), in any order, never occurs in training scenes.

    A fixed hash of the sorted pair decides, so the rule does not depend on a seed or on a list of nouns.
    """
    digest = hashlib.sha256("+".join(sorted((noun, other))).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def combinations(scene: Scene) -> list[tuple[str, str]]:
    """Every (noun, noun) pair of different nouns and every (noun, colour) pair in a scene."""
    nouns = sorted({item.noun for item in scene.objects})
    pairs = [(first, second) for i, first in enumerate(nouns) for second in nouns[i + 1 :]]
    return pairs + sorted({(item.noun, item.colour) for item in scene.objects if item.colour})


def sample_scene(rng: np.random.Generator, *, kind: str | None = None, split: str = "train") -> Scene:
    """Draws one scene.

    Args:
        rng: source of every choice.
        kind: one of `KINDS`; None draws it by `KIND_PROBABILITIES`.
        split: "train" (no held-out combination), "unseen" (the combination that the caption's kind is about is held
            out; for single and count, which combine nothing but a shape with its colour, any scene) or "any".

    Raises:
        ValueError: unknown kind or split.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if split not in ("train", "unseen", "any"):
        raise ValueError(f"split is {split!r}; choose train, unseen or any")
    kind = kind or str(rng.choice(KINDS, p=KIND_PROBABILITIES))
    while True:
        scene = _SAMPLERS[kind](rng)
        held_out = [is_held_out(*pair) for pair in combinations(scene)]
        if split == "any" or (split == "train" and not any(held_out)):
            return scene
        if split == "unseen" and (kind in ("single", "count") or (held_out and held_out[0])):
            return scene


def scenes(seed: int, *, split: str = "train") -> Iterator[Scene]:
    """An endless stream of scenes from a seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_scene(rng, split=split)


def draw_scene(scene: Scene) -> np.ndarray:
    """Renders a scene to (256, 256, 3) uint8 RGB."""
    canvas = np.empty((GRID * CELL, GRID * CELL, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        rgba = sprite(item.noun, item.colour, item.cells * CELL)
        top, left = item.row * CELL, item.column * CELL
        window = canvas[top : top + rgba.shape[0], left : left + rgba.shape[1]]
        window += rgba[..., 3:] * (rgba[..., :3] - window)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def plural(noun: str) -> str:
    """English plural of a noun of this data set."""
    irregular = {"octopus": "octopuses", "cactus": "cacti", "fox": "foxes", "cross": "crosses", "bus": "buses"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + "s"


def _phrase(noun: str, colour: str | None, *, size: str = "", count: int = 1) -> str:
    words = " ".join(filter(None, (size, colour, noun if count == 1 else plural(noun))))
    if count > 1:
        return f"{COUNT_WORDS[count]} {words}"
    return ("an " if words[0] in "aeiou" and not words.startswith("uni") else "a ") + words


def _thing(
    rng: np.random.Generator, *, shape: bool | None = None, exclude: str | None = None
) -> tuple[str, str | None]:
    """A noun, and a colour when it is a shape."""
    names: Sequence[str] = SHAPES if shape else NOUNS
    noun = exclude
    while noun == exclude:
        noun = str(rng.choice(names))
    assert noun is not None
    return noun, str(rng.choice(list(COLOURS))) if noun in SHAPES else None


def _background(rng: np.random.Generator, avoid: set[str | None]) -> tuple[str, str]:
    """(name, caption suffix): an unmentioned background is always white; no object stands on its own colour."""
    if rng.random() < 0.4:
        return "white", ""
    name = str(rng.choice([name for name in BACKGROUNDS if name not in avoid]))
    return name, f" on a {name} background"


def _scene(rng: np.random.Generator, kind: str, text: str, objects: list[SceneObject], relation=None) -> Scene:
    avoid = {item.colour or NATURAL_COLOURS.get(item.noun) for item in objects}
    background, suffix = _background(rng, avoid)
    return Scene(kind, text + suffix, background, tuple(objects), relation)


def _single(rng: np.random.Generator, *, shape: bool | None = None, kind: str = "single") -> Scene:
    noun, colour = _thing(rng, shape=shape)
    size = str(rng.choice(list(SIZE_CELLS), p=(0.2, 0.6, 0.2)))
    cells = SIZE_CELLS[size]
    free = GRID - cells
    row, column = free // 2, free // 2
    place = ""
    if size != "big" and rng.random() < 0.35:
        place = str(rng.choice(PLACES))
        row = {"at the top": 0, "at the bottom": free}.get(place, row)
        column = {"on the left": 0, "on the right": free}.get(place, column)
    elif size == "":
        row, column = row + int(rng.integers(-1, 2)), column + int(rng.integers(-1, 2))
    text = " ".join(filter(None, (_phrase(noun, colour, size=size), place)))
    return _scene(rng, kind, text, [SceneObject(noun, colour, cells, row, column)])


def _colour(rng: np.random.Generator) -> Scene:
    return _single(rng, shape=True, kind="colour")


def _lanes(rng: np.random.Generator) -> tuple[int, int]:
    """Two columns (or rows) for 3-cell objects, at least one free cell apart."""
    return ((0, 4), (0, 5), (1, 5))[int(rng.integers(3))]


def _two(rng: np.random.Generator) -> Scene:
    """ "A and B": side by side in reading order."""
    first, second = _pair(rng)
    left, right = _lanes(rng)
    row = int(rng.integers(1, 5))
    objects = [SceneObject(*first, MULTI_CELLS, row, left), SceneObject(*second, MULTI_CELLS, row, right)]
    return _scene(rng, "two", f"{_phrase(*first)} and {_phrase(*second)}", objects)


def _position(rng: np.random.Generator) -> Scene:
    first, second = _pair(rng)
    relation = str(rng.choice(RELATIONS))
    low, high = _lanes(rng)
    across = int(rng.integers(1, 5))
    near, far = (low, high) if relation in ("to the left of", "above") else (high, low)
    horizontal = relation.startswith("to the")
    corners = [(across, near), (across, far)] if horizontal else [(near, across), (far, across)]
    objects = [
        SceneObject(*thing, MULTI_CELLS, *corner) for thing, corner in zip((first, second), corners, strict=True)
    ]
    return _scene(rng, "position", f"{_phrase(*first)} {relation} {_phrase(*second)}", objects, relation)


def _pair(rng: np.random.Generator) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    first = _thing(rng)
    return first, _thing(rng, exclude=first[0])


def _slots(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """(row, column) of `count` 3-cell objects in reading order: a row of two, then one centred or two below."""
    left, right = _lanes(rng)
    if count == 2:
        row = int(rng.integers(1, 5))
        return [(row, left), (row, right)]
    top, bottom = _lanes(rng)
    below = [(bottom, (left + right) // 2)] if count == 3 else [(bottom, left), (bottom, right)]
    return [(top, left), (top, right), *below]


def _count(rng: np.random.Generator) -> Scene:
    noun, colour = _thing(rng)
    count = int(rng.integers(2, 5))
    objects = [SceneObject(noun, colour, MULTI_CELLS, *slot) for slot in _slots(rng, count)]
    return _scene(rng, "count", _phrase(noun, colour, count=count), objects)


def _two_and_one(rng: np.random.Generator) -> Scene:
    first, second = _pair(rng)
    objects = [SceneObject(*t, MULTI_CELLS, *s) for t, s in zip((first, first, second), _slots(rng, 3), strict=True)]
    return _scene(rng, "two_and_one", f"{_phrase(*first, count=2)} and {_phrase(*second)}", objects)


_SAMPLERS = {
    "single": _single, "two": _two, "count": _count, "colour": _colour, "position": _position,
    "two_and_one": _two_and_one,
}  # fmt: skip
