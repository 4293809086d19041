"""Prompt files (.txt, .json), suffixes in prompts (--ar, --hw), file names made of prompts. No picture is made here."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana.data.aspect_ratio import ASPECT_RATIOS, classify_height_width_bin
from sana.registry import suggest
from sana.utils.logging import get_logger
from sana.utils.seed import MAX_SEED

logger = get_logger(__name__)

JSON_FIELDS = ("prompt", "negative_prompt", "seed", "height", "width")
NAME_BYTES = 120  # of a file name's stem in UTF-8; file systems allow 255 for the whole name
_SUFFIX = re.compile(r"--(?P<key>aspect_ratio|ar|hw)(?![\w-])(?:[ \t]+|=)?(?P<value>[^\s]*)")
_PAIR = re.compile(r"(\d{1,6}(?:\.\d{1,6})?):(\d{1,6}(?:\.\d{1,6})?)")
_UNSAFE = re.compile(r'[<>:"/\\|?*\s]+')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class PromptFileError(ValueError):
    """A prompt file that is missing, empty or malformed; the message names the file and, if known, line and column."""


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt without its suffixes, and what they said."""

    prompt: str
    aspect_ratio: float | None = None  # height / width
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class PromptItem:
    """One picture that a prompt file asks for. None means: not said there, the command's own value holds."""

    id: str
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    aspect_ratio: float | None = None  # height / width, of --ar

    def size(self, image_size: int) -> tuple[int, int]:
        """Returns (height, width) in pixels for a model of a resolution: what the prompt says, else its square.

        Args:
            image_size: the model's resolution; an aspect ratio picks the nearest size of its table of trained sizes.

        Raises:
            ValueError: an aspect ratio is asked for and there is no table for this resolution.
        """
        if self.aspect_ratio is None:
            return self.height or image_size, self.width or image_size
        table = ASPECT_RATIOS.get(f"ASPECT_RATIO_{image_size}_TEST")
        if table is None or len(table) == 1:
            raise ValueError(
                f"--ar cannot take effect: there is no table of sizes for image_size {image_size}; use --hw instead."
            )
        height, width = classify_height_width_bin(self.aspect_ratio, 1.0, table)
        return self.height or height, self.width or width


def parse_suffixes(text: str) -> ParsedPrompt:
    """Separates a prompt from `--ar 1:2` (or `--aspect_ratio`; height:width) and `--hw 512:1024` (pixels).

    The prompt ends where the first suffix begins, and keeps its spaces. Of several ratios `--aspect_ratio` wins, then
    the first, as officially.

    Raises:
        ValueError: a suffix without a usable value.
    """
    matches = list(_SUFFIX.finditer(text))
    if not matches:
        return ParsedPrompt(text)
    values: dict[str, tuple[float, float]] = {}
    for match in matches:
        values.setdefault(match["key"], _read_pair(match))
    ignored = _SUFFIX.sub("", text[matches[0].start() :]).strip()
    if ignored:
        logger.warning("the text %r after a suffix is no part of the prompt %r", ignored, text[: matches[0].start()])
    high, wide = values.get("aspect_ratio") or values.get("ar") or (None, None)
    height, width = values.get("hw", (None, None))
    return ParsedPrompt(
        text[: matches[0].start()],
        aspect_ratio=high / wide if high and wide else None,
        height=int(height) if height else None,
        width=int(width) if width else None,
    )


def read_prompts(path: str | Path) -> list[PromptItem]:
    """Reads a prompt file: `.json` is id -> {"prompt", optional fields}; any other is text, one prompt a line.

    Args:
        path: UTF-8, with or without a byte order mark. Empty lines of a text file are skipped.

    Returns:
        At least one item, in the order of the file; the id of a text file's prompt is its line number.

    Raises:
        PromptFileError: missing, empty, not UTF-8, malformed, or with a wrong field.
    """
    path = Path(path)
    text = _read_text(path)
    if not text.strip():
        raise PromptFileError(f"{path} is empty; it must hold at least one prompt.")
    return _read_json(path, text) if path.suffix.lower() == ".json" else _read_lines(path, text)


def safe_name(prompt: str, taken: set[str]) -> str:
    """Returns a file name without extension that says the prompt, works on every system, and is not taken yet.

    Letters of every script and emoji stay. A name that had to be cut ends with a hash of the whole prompt. Names that
    differ only in case, or in how accents are encoded, count as equal, since some file systems think so.

    Args:
        prompt: any text.
        taken: the names given so far; the new one is added.
    """
    name = _clean(prompt)
    cut = _cut(name, NAME_BYTES)
    if cut != name:
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{_cut(name, NAME_BYTES - 9)}-{digest}"
    unique, number = name, 1
    while _key(unique) in taken:
        number += 1
        unique = f"{name}-{number}"
    taken.add(_key(unique))
    return unique


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise PromptFileError(f"{path} is a folder; a prompt file is needed.")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise PromptFileError(f"The prompt file {path} does not exist.") from error
    except OSError as error:
        raise PromptFileError(f"The prompt file {path} cannot be read: {error.strerror}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptFileError(f"{path}, line {line}: this is not UTF-8 text; save the file as UTF-8.") from error


def _read_lines(path: Path, text: str) -> list[PromptItem]:
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            items.append(_with_suffixes(PromptItem(id=str(number), prompt=line.strip()), f"{path}, line {number}"))
    return items


def _read_json(path: Path, text: str) -> list[PromptItem]:
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise PromptFileError(
            f"{path}, line {error.lineno}, column {error.colno}: this is not JSON: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{path}: {error}.") from error
    if not isinstance(content, dict) or not content:
        raise PromptFileError(f'{path} must hold an object {{"id": {{"prompt": "..."}}, ...}} with at least one entry.')
    unknown = {
        field for entry in content.values() if isinstance(entry, dict) for field in entry if field not in JSON_FIELDS
    }
    for field in sorted(unknown):
        logger.warning("%s: the field %r has no effect.%s", path, field, suggest(field, list(JSON_FIELDS)))
    return [_read_entry(key, entry, f"{path}, entry {key!r}") for key, entry in content.items()]


def _read_entry(key: str, entry: Any, where: str) -> PromptItem:
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise PromptFileError(f'{where}: expected an object with the field "prompt".')
    item = PromptItem(
        id=key,
        prompt=_field(entry, "prompt", _is_text, "a text", where),
        negative_prompt=_field(entry, "negative_prompt", _is_text, "a text", where),
        seed=_field(entry, "seed", lambda value: _is_int(value, 0, MAX_SEED), "a whole number in [0, 2**63)", where),
        height=_field(entry, "height", lambda value: _is_int(value, 1, 10**6), "a positive number of pixels", where),
        width=_field(entry, "width", lambda value: _is_int(value, 1, 10**6), "a positive number of pixels", where),
    )
    return _with_suffixes(item, where)


def _field(entry: dict[str, Any], name: str, allowed: Callable[[Any], bool], expected: str, where: str) -> Any:
    value = entry.get(name)
    if value is None and name != "prompt":
        return None
    if not allowed(value):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise PromptFileError(f"{where}: {name} must be {expected}, not {shown}.")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any(unicodedata.category(letter) == "Cs" for letter in value)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _with_suffixes(item: PromptItem, where: str) -> PromptItem:
    try:
        parsed = parse_suffixes(item.prompt)
    except ValueError as error:
        raise PromptFileError(f"{where}: {error}") from error
    if parsed == ParsedPrompt(item.prompt):
        return item
    if item.height or item.width:
        raise PromptFileError(f"{where}: the size is given twice, by fields and by a suffix of the prompt.")
    return replace(
        item,
        prompt=parsed.prompt.rstrip(),
        aspect_ratio=parsed.aspect_ratio,
        height=parsed.height,
        width=parsed.width,
    )


def _read_pair(match: re.Match[str]) -> tuple[float, float]:
    """The two numbers of `--ar 1:2`, both above 0; whole numbers for --hw."""
    pair = _PAIR.fullmatch(match["value"])
    numbers = (float(pair[1]), float(pair[2])) if pair else (0.0, 0.0)
    whole = match["key"] != "hw" or all(number.is_integer() for number in numbers)
    if not (all(numbers) and whole):
        example = "--hw 512:1024" if match["key"] == "hw" else f"--{match['key']} 1:2"
        raise ValueError(f"--{match['key']} needs height:width, as in {example!r}, not {match['value']!r}.")
    return numbers


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
        )
    return seen


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _clean(prompt: str) -> str:
    """Spaces for what file systems forbid and for control letters; no dots, dashes or spaces at the ends."""
    kept = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in prompt)
    name = _UNSAFE.sub(" ", kept).strip(" .").lstrip("-~ .")
    if _RESERVED.fullmatch(name):
        name = f"{name}_"
    return name or "empty prompt"


def _cut(name: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, not in the middle of a letter with its accents or of a joined emoji."""
    encoded = name.encode("utf-8")
    if len(encoded) <= limit:
        return name
    cut = len(encoded[:limit].decode("utf-8", "ignore"))
    while cut > 0 and (_joins(name[cut]) or name[cut - 1] == "\u200d"):
        cut -= 1
    return name[:cut].rstrip(" .") or encoded[:limit].decode("utf-8", "ignore")


def _joins(letter: str) -> bool:
    """Whether a letter belongs to the one before it: accents, variation selectors, skin tones, joiners."""
    return (
        unicodedata.category(letter) in ("Mn", "Me", "Mc")
        or letter == "\u200d"
        or "\U0001f3fb" <= letter <= "\U0001f3ff"
    )


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
