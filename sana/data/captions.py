"""Which caption of an image is trained on: reading caption files and choosing by score. No image is touched here."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.data.image_records import ImageRecord
from sana.data.sample import BrokenSampleError

PROMPT = "prompt"  # the name of an image's own caption, beside those of captioners
CAPTION_LINES = ("first", "all")
Scores = Sequence[tuple[str, float]]


def caption_probabilities(
    scores: Scores, *, clip_thr: float = 0.0, clip_thr_temperature: float = 1.0
) -> tuple[list[str], list[float]]:
    """Returns the captions that may be drawn, and how probable each is.

    p is proportional to score^(1 / max(temperature, 0.01)) among the captions with score >= `clip_thr`: no softmax.

    Args:
        scores: (caption name, score) in the order of the files; a name may occur twice.
        clip_thr: lowest score that is drawn.
        clip_thr_temperature: 1 draws in proportion to the score, 0 practically always the best.

    Returns:
        Names and probabilities, both empty where no score is high enough.
    """
    passing = [(name, score) for name, score in scores if score >= clip_thr]
    if not passing:
        return [], []
    best = max(score for _, score in passing)
    if best <= 0:  # a power of these is no probability
        return [], []
    power = 1.0 / max(clip_thr_temperature, 0.01)
    weights = [(max(score, 0.0) / best) ** power for _, score in passing]
    total = math.fsum(weights)
    return [name for name, _ in passing], [weight / total for weight in weights]


def choose_caption(
    captions: Mapping[str, str],
    scores: Scores,
    rng: random.Random,
    *,
    clip_thr: float = 0.0,
    clip_thr_temperature: float = 1.0,
) -> tuple[str, float | None]:
    """Chooses one caption: drawn by `caption_probabilities`, else the best score, else "prompt", else the first.

    Scores of captions that are not there do not count. `rng` is used at most once, and only where there is a choice by
    score.

    Args:
        captions: name -> text, not empty.
        scores: (caption name, score) in the order of the files.
        rng: source of the draw.
        clip_thr: lowest score that is drawn.
        clip_thr_temperature: see `caption_probabilities`.

    Returns:
        The name, and its score (None where no score decided).
    """
    known = [(name, score) for name, score in scores if name in captions and math.isfinite(score)]
    names, probabilities = caption_probabilities(known, clip_thr=clip_thr, clip_thr_temperature=clip_thr_temperature)
    if names:
        chosen = rng.choices(names, weights=probabilities, k=1)[0]
        return chosen, next(score for name, score in known if name == chosen and score >= clip_thr)
    if known:
        return max(known, key=lambda pair: pair[1])
    return (PROMPT if PROMPT in captions else next(iter(captions))), None


def prompt_of(record: ImageRecord, lines: str) -> str:
    """Returns an image's own caption: of its folder's `meta_data.json`, else of the text file beside it, else "".

    Args:
        record: of the image.
        lines: see `caption_of_text`.

    Raises:
        BrokenSampleError: the text file cannot be read.
    """
    if record.prompt is not None:
        return record.prompt
    if not record.text_suffix:
        return ""
    try:
        text = Path(record.stem + record.text_suffix).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenSampleError(record.key, f"its text file cannot be read: {error}") from error
    return caption_of_text(text, lines)


def caption_of_text(text: str, lines: str = "first") -> str:
    """Returns the caption in the content of a text file.

    Args:
        text: the content; may start with a byte order mark.
        lines: "first": the first line that is not blank; "all": every line that is not blank, joined by newlines.

    Returns:
        The caption without white space around it; "" where there is none.
    """
    if lines not in CAPTION_LINES:
        raise ValueError(f"caption_lines is {lines!r}; choose one of {', '.join(CAPTION_LINES)}.")
    stripped = [line.strip() for line in text.removeprefix("\ufeff").replace("\r", "\n").split("\n")]
    filled = [line for line in stripped if line]
    return "\n".join(filled if lines == "all" else filled[:1])


def captions_of_json(content: Any, name: str) -> dict[str, str]:
    """Returns {captioner: text} of the image `name` in a captioner's file, `{name: {captioner: text}}`.

    Blank texts are left out.

    Raises:
        ValueError: an entry for the image is there, but holds something else than texts.
    """
    captions = {}
    for kind, text in _entry(content, name).items():
        if not isinstance(text, str | None):
            raise ValueError(f"the caption {kind!r} of {name!r} is {text!r}, not a text")
        if text and text.strip():
            captions[kind] = text
    return captions


def scores_of_json(content: Any, name: str) -> list[tuple[str, float]]:
    """Returns (captioner, score) pairs of the image `name` in a score file, `{name: {captioner: number or text}}`.

    Raises:
        ValueError: an entry for the image is there, but holds something else than numbers.
    """
    scores = []
    for kind, score in _entry(content, name).items():
        try:
            scores.append((kind, float(score)))
        except (TypeError, ValueError):
            raise ValueError(f"the score of {kind!r} for {name!r} is {score!r}, not a number") from None
    return scores


def _entry(content: Any, name: str) -> dict[str, Any]:
    entry = content.get(name, {}) if isinstance(content, dict) else {}
    if not isinstance(entry, dict):
        # `name.json` beside an image may describe it in ways that are no captions; only {name: {...}} is read.
        raise ValueError(f"the entry of {name!r} is {entry!r}, not a mapping of captioners")
    return entry


def read_json(path: str | Path, key: str) -> Any:
    """Reads a JSON file beside a record; None where there is no such file.

    Args:
        path: the file.
        key: of the record, for the error.

    Raises:
        BrokenSampleError: the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenSampleError(key, f"{path} is not readable JSON: {error}") from error
