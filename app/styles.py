"""Styles: words that a named style puts around a prompt, read from `asset/app_styles/*.json`. No page is here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.pipelines.options import bundled

NO_STYLE = "(No style)"
STYLES = "asset/app_styles"
PLACE = "{prompt}"  # where the prompt goes
KEYS = ("name", "prompt", "negative_prompt")
LONGEST_NAME = 40  # characters; names are buttons


class StyleError(ValueError):
    """A file of styles is broken."""


@dataclass(frozen=True)
class Style:
    """One style.

    Attributes:
        name: as the page shows it.
        prompt: a text with `{prompt}` where the prompt goes.
        negative_prompt: what the style leads away from.
    """

    name: str
    prompt: str = PLACE
    negative_prompt: str = ""

    def apply(self, prompt: str, negative_prompt: str) -> tuple[str, str]:
        """Returns the prompt and the negative prompt with the style's words. Braces in a prompt mean nothing."""
        before, _, after = self.prompt.partition(PLACE)
        negatives = [one for one in (negative_prompt.strip(), self.negative_prompt) if one]
        return f"{before}{prompt.strip()}{after}", ", ".join(negatives)


def load_styles(folder: str | Path | None = None) -> dict[str, Style]:
    """Returns the styles of all files by name: `(No style)` first, then file after file in the order of their names.

    Args:
        folder: of `.json` files, each one style or a list of them; None for the repository's own.

    Raises:
        StyleError: a file cannot be read, is no JSON, or holds something that is no style; a name occurs twice.
    """
    styles = {NO_STYLE: Style(NO_STYLE)}
    for path in sorted((bundled(STYLES) if folder is None else Path(folder)).glob("*.json")):
        content = _read(path)
        for number, entry in enumerate(content if isinstance(content, list) else [content], 1):
            where = f"{path}, style {number}" if isinstance(content, list) else str(path)
            style = _as_style(entry, where)
            if style.name in styles:
                raise StyleError(f"{where}: the name {style.name!r} is taken already; give every style its own name.")
            styles[style.name] = style
    return styles


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StyleError(f"{path} cannot be read: {error.strerror or type(error).__name__}.") from error
    except (ValueError, RecursionError) as error:
        raise StyleError(f"{path} is no valid JSON in UTF-8 ({error}); a file holds one style or a list.") from error


def _as_style(entry: object, where: str) -> Style:
    if not isinstance(entry, Mapping):
        raise StyleError(f"{where} must be an object with {', '.join(KEYS)}, not {type(entry).__name__}.")
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise StyleError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(KEYS)}.")
    wrong = [key for key in entry if not isinstance(entry[key], str)]
    if wrong:
        raise StyleError(f"{where}: {wrong[0]} must be a text, not {type(entry[wrong[0]]).__name__}.")
    style = Style(**{"prompt": "", "name": "", **entry})
    if not style.name.strip() or len(style.name) > LONGEST_NAME:
        raise StyleError(f"{where} needs a name of 1 to {LONGEST_NAME} characters.")
    if style.prompt.count(PLACE) != 1:
        raise StyleError(f"{where}: prompt must hold {PLACE} once, and it is {style.prompt!r}.")
    return style
