"""Sprites of the drawn data set: colour emoji from a font and plain coloured shapes, as cached RGBA arrays.

What a scene contains, and its caption, is decided in `scenes.py`; nothing here knows about layout or language.
"""

import functools
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 109  # the only bitmap size that Noto Color Emoji holds
FONT = Path(__file__).parents[2] / "asset/fonts/NotoColorEmoji-scenes.ttf"  # a subset that holds EMOJI, see its LICENSE
MARGIN = 0.94  # a sprite fills this part of its box, so that neighbours never touch

EMOJI = "🍋🍌🍉🍓🍍🥕🍄🌻🌹🌵🚗🚌🚀⚓🔔🎈🎸👑🐙🐢🐘🐌🐧🦉🦊🐸🐱🐶🍩🍔🏠🌲⚽🦋"
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")
COLOURS = {
    "red": (220, 30, 40), "green": (30, 150, 60), "blue": (35, 80, 220), "yellow": (250, 205, 20),
    "orange": (250, 125, 20), "purple": (130, 45, 170), "black": (25, 25, 25), "brown": (125, 75, 35),
}  # fmt: skip
BACKGROUNDS = {
    "white": (255, 255, 255), "gray": (195, 195, 195), "blue": (176, 212, 255), "green": (188, 236, 190),
    "yellow": (255, 244, 176), "pink": (255, 206, 222),
}  # fmt: skip


def unicode_noun(emoji: str) -> str:
    """The noun of an emoji: its Unicode name in lower case, without the word "face" ("FROG FACE" -> "frog")."""
    return unicodedata.name(emoji).lower().removesuffix(" face")


EMOJI_BY_NOUN = {unicode_noun(emoji): emoji for emoji in EMOJI}
NOUNS = (*EMOJI_BY_NOUN, *SHAPES)


@functools.cache
def sprite(noun: str, colour: str | None, size: int) -> np.ndarray:
    """One object centred in a transparent square box.

    Args:
        noun: one of `NOUNS`.
        colour: one of `COLOURS` for a shape, None for an emoji.
        size: side of the box in pixels.

    Returns:
        (size, size, 4) float32 RGBA in [0, 255], alpha in [0, 1].
    """
    inner = round(size * MARGIN)
    image = _emoji(noun) if noun in EMOJI_BY_NOUN else _shape(noun, COLOURS[colour or "red"])
    scale = inner / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.LANCZOS)
    box = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    box.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    array = np.asarray(box, dtype=np.float32).copy()
    array[..., 3] /= 255.0
    return array


def _emoji(noun: str) -> Image.Image:
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((12, 12), EMOJI_BY_NOUN[noun], font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def _shape(name: str, rgb: tuple[int, int, int]) -> Image.Image:
    """A flat shape drawn at 4x and reduced, so that its edge is anti-aliased."""
    side = 768
    mask = Image.new("L", (side, side), 0)
    draw, last = ImageDraw.Draw(mask), side - 1
    if name == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif name == "ring":
        draw.ellipse((0, 0, last, last), fill=255)
        draw.ellipse((side * 0.26, side * 0.26, side * 0.74, side * 0.74), fill=0)
    elif name == "square":
        draw.rectangle((side * 0.06, side * 0.06, side * 0.94, side * 0.94), fill=255)
    elif name == "cross":
        draw.rectangle((side * 0.34, 0, side * 0.66, last), fill=255)
        draw.rectangle((0, side * 0.34, last, side * 0.66), fill=255)
    elif name == "heart":
        t = np.linspace(0, 2 * np.pi, 400)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        _polygon(draw, np.stack([x, y], axis=1), side)
    else:
        draw_points = {
            "triangle": [(0.5, 0.06), (1, 0.94), (0, 0.94)],
            "diamond": [(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)],
            "star": [
                (0.5 + r * np.sin(k * np.pi / 5), 0.53 - r * np.cos(k * np.pi / 5))
                for k, r in enumerate([0.53, 0.22] * 5)
            ],
        }[name]
        draw.polygon([(px * last, py * last) for px, py in draw_points], fill=255)
    mask = mask.resize((side // 4, side // 4), Image.BOX)
    image = Image.new("RGBA", mask.size, (*rgb, 0))
    image.putalpha(mask)
    return image


def _polygon(draw: ImageDraw.ImageDraw, points: np.ndarray, side: int) -> None:
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) / (high - low).max() + 0.5
    draw.polygon([tuple(p) for p in points * (side - 1)], fill=255)
