"""Image tensors to pictures, PNG files that hold their recipe, and contact sheets. Nothing is generated here."""

import io
import json
import math
import os
import secrets
import struct
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from sana.pipelines.graphs import to_host

RECIPE_KEY = "sana"  # the PNG's text chunk that holds the recipe as JSON
DAMAGED = (  # what Pillow and json raise for damaged and hostile files
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    RecursionError,
    struct.error,
    Image.DecompressionBombError,
)
STRIP = 2**20  # pixels that are rounded at once: an image of 4096 px is not copied as a whole in float32
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf")


def to_pil(images: Tensor) -> list[Image.Image]:
    """Returns pictures of 8 bits a channel.

    Args:
        images: (B, 3, H, W) or (3, H, W), floating point; clamped to [-1, 1] and rounded to the nearest of 256 levels.

    Raises:
        ValueError: another shape, or a value that is not finite (it would become an arbitrary colour).
    """
    batch = images.detach()[None] if images.ndim == 3 else images.detach()
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"Expected images (B, 3, H, W), not the shape {tuple(images.shape)}.")
    levels = torch.empty(batch.shape[0], *batch.shape[2:], 3, dtype=torch.uint8, device=batch.device)
    finite = torch.ones((), dtype=torch.bool, device=batch.device)
    rows = max(1, STRIP // max(1, batch.shape[3]))
    for image, level in zip(batch, levels, strict=True):
        for strip, out in zip(image.split(rows, dim=1), level.split(rows), strict=True):
            finite &= torch.isfinite(strip).all()
            # another tensor than the caller's from clamp() on
            out.copy_(strip.float().clamp(-1, 1).add_(1).mul_(127.5).round_().permute(1, 2, 0))
    if not bool(finite):
        raise ValueError("The images hold values that are not finite.")
    return [Image.fromarray(one) for one in to_host(levels)[0].numpy()]


def save_png(image: Image.Image, path: str | Path, recipe: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG that appears whole or not at all.

    Args:
        image: the picture.
        path: its file; the folder must exist. A file of that name is replaced.
        recipe: JSON-able; stored in the file with its prompt, if it has one, as the description other programs show.
    """
    path = Path(path)
    text = _texts(recipe)
    temporary = path.with_name(f".{secrets.token_hex(6)}.png.part")
    try:
        image.save(temporary, format="PNG", pnginfo=text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def png_bytes(image: Image.Image, recipe: Mapping[str, Any] | None = None) -> bytes:
    """Returns the very bytes of the file that `save_png` would write. Nothing touches the disk."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_texts(recipe))
    return buffer.getvalue()


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """Returns the recipe stored in a PNG; None where there is none, or the file is no whole picture.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        with Image.open(path) as image:
            image.load()  # a truncated picture fails here
            stored = json.loads(getattr(image, "text", {}).get(RECIPE_KEY, "null"))
    except FileNotFoundError:
        raise
    except DAMAGED:
        return None
    return stored if isinstance(stored, dict) else None


def contact_sheet(
    images: Sequence[Image.Image | str | Path],
    captions: Sequence[str] = (),
    *,
    columns: int | None = None,
    cell: int = 256,
) -> Image.Image:
    """Returns one picture with all the given ones in rows, each with its caption below.

    Args:
        images: pictures or files of pictures; a file that does not exist leaves its place empty.
        captions: one for each picture, or none. At most three lines are shown. Letters that no installed font has
            show as boxes.
        columns: pictures a row; about as many as rows when None.
        cell: greatest side of a picture, in pixels; smaller pictures are not enlarged.

    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if not images or (captions and len(captions) != len(images)):
        raise ValueError(f"Expected pictures with one caption each, not {len(images)} and {len(captions)} captions.")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    margin, line = 8, 16
    below = 3 * line + margin if captions else 0
    sheet = Image.new(
        "RGB", (columns * (cell + margin) + margin, rows * (cell + below + margin) + margin), (255, 255, 255)
    )
    draw, font = ImageDraw.Draw(sheet), _font(line - 4)
    for index, one in enumerate(images):
        left = margin + (index % columns) * (cell + margin)
        top = margin + (index // columns) * (cell + below + margin)
        picture = _thumbnail(one, cell)
        if picture is not None:
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
        if captions:
            for number, text in enumerate(_wrap(captions[index], font, cell)):
                draw.text((left, top + cell + 2 + number * line), text, fill=(0, 0, 0), font=font)
    return sheet


def _texts(recipe: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    """Returns the text chunks of a picture with a recipe."""
    text = PngImagePlugin.PngInfo()
    if recipe:
        text.add_itxt(RECIPE_KEY, _as_json(recipe))
        if recipe.get("prompt"):
            text.add_itxt("Description", str(recipe["prompt"]).encode("utf-8", "replace").decode("utf-8"))
    return text


def _as_json(recipe: Mapping[str, Any]) -> str:
    text = json.dumps(recipe, ensure_ascii=False, sort_keys=True)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: JSON has an escape for it, UTF-8 has not
        text = json.dumps(recipe, sort_keys=True)
    return text


def _thumbnail(image: Image.Image | str | Path, side: int) -> Image.Image | None:
    if isinstance(image, Image.Image):
        picture = image.convert("RGB")
    elif not Path(image).is_file():
        return None
    else:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    picture.thumbnail((side, side))
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int = 3) -> list[str]:
    """At most `lines` lines of the caption that fit into `width` pixels; the last ends with "..." when text is left."""
    text = " ".join(caption.split())
    letters = max(1, int(len(text) * width / max(1.0, font.getlength(text)))) if text else 1
    while letters > 1:  # letters differ in width: shrink until every line fits
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder="...") if letters > 3 else [text[:letters]]
        if all(font.getlength(one) <= width for one in wrapped):
            return wrapped
        letters -= 1
    return [text[:1]]
