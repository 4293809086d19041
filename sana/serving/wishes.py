"""What a client asks for: JSON of `POST /v1/images/generations`, checked field by field. Nothing is generated here."""

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sana.pipelines.request import Request
from sana.serving.errors import ApiError, invalid
from sana.serving.settings import ServerSettings

MAX_SEED = 2**53  # JavaScript's whole numbers end here, and n pictures count up from a seed
MAX_GUIDANCE = 100.0
DRAWN_SEEDS = 2**32
MAX_PREVIEWS = 3
IGNORED = ("user", "safety_identifier")  # texts about the caller: they decide nothing, there as here
# OpenAI's fields of which only some values mean what this server does; each with those.
ONLY: dict[str, Collection[object]] = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "output_format": ("png",),
    "output_compression": (100,),
}


@dataclass(frozen=True)
class Wish:
    """One checked request.

    Attributes:
        prompt, negative_prompt: texts.
        n: number of pictures; picture i uses seed + i.
        height, width: in pixels; None for the model's own size.
        seed: given, or drawn.
        steps, guidance, pag: None for the defaults.
        response_format: "b64_json" or "url".
        stream: whether progress is told.
        partial_images: previews of each picture in the stream.
    """

    prompt: str
    n: int
    height: int | None
    width: int | None
    seed: int
    steps: int | None = None
    guidance: float | None = None
    pag: float | None = None
    negative_prompt: str | None = None
    response_format: str = "b64_json"
    stream: bool = False
    partial_images: int = 0

    def requests(self) -> list[Request]:
        """Returns the pipeline's requests, one a picture.

        Raises:
            ApiError: the pipeline cannot take them.
        """
        options: dict[str, Any] = {"height": self.height, "width": self.width, "num_inference_steps": self.steps}
        if self.guidance is not None:
            options["guidance_scale"] = self.guidance
        if self.pag is not None:
            options["pag_scale"] = self.pag
        common = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "output_type": "pil"} | options
        try:
            return [Request(seed=self.seed + index, **common) for index in range(self.n)]
        except ValueError as error:
            raise invalid(None, "The options do not fit together.") from error


def parse_body(body: bytes) -> dict[str, Any]:
    """Returns the JSON object of a body.

    Raises:
        ApiError: it is none.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise invalid(None, "The body is no valid JSON.", "invalid_json") from None
    if not isinstance(content, dict):
        raise invalid(None, "The body must be a JSON object.", "invalid_type")
    return content


def parse_wish(content: Mapping[str, Any], settings: ServerSettings, model: str, image_size: int) -> Wish:
    """Checks every field. Fields that OpenAI does not know are errors, as there; null counts as not given.

    Args:
        content: the body.
        settings: the limits.
        model: the name that clients use.
        image_size: of the model, in pixels.

    Raises:
        ApiError: with the field's name.
    """
    given = {name: value for name, value in content.items() if value is not None}
    _check_names(given, model)
    fields = _Fields(given)
    stream = fields.truth("stream")
    n = fields.whole("n", 1, settings.max_images, 1)
    previews = fields.whole("partial_images", 0, MAX_PREVIEWS, 0)
    if previews and not stream:
        raise invalid("partial_images", "partial_images has an effect with stream only.")
    height, width = parse_size(fields.text("size", 40, "auto"), settings, image_size)
    form = fields.text("response_format", 40, "b64_json")
    if form not in ("b64_json", "url"):
        raise invalid("response_format", "response_format must be 'b64_json' or 'url'.")
    if form == "url" and stream:
        raise invalid("response_format", "A stream carries its pictures itself; response_format must be 'b64_json'.")
    prompt = fields.text("prompt", settings.max_prompt, None)
    if not prompt.strip():
        raise invalid("prompt", "prompt must not be empty.")
    return Wish(
        prompt=prompt,
        n=n,
        height=height,
        width=width,
        seed=fields.whole("seed", 0, MAX_SEED, secrets.randbelow(DRAWN_SEEDS)),
        steps=fields.whole("steps", 1, settings.max_steps, 0) or None,
        guidance=fields.number("guidance", 0.0, MAX_GUIDANCE),
        pag=_pag(fields.number("pag", 0.0, MAX_GUIDANCE)),
        negative_prompt=fields.text("negative_prompt", settings.max_prompt, "") or None,
        response_format=form,
        stream=stream,
        partial_images=previews,
    )


def parse_size(size: str, settings: ServerSettings, image_size: int) -> tuple[int | None, int | None]:
    """Returns (height, width) of "WIDTHxHEIGHT"; (None, None) for "auto".

    Raises:
        ApiError: it is something else, or too large or too narrow.
    """
    if size == "auto":
        return None, None
    sides = size.split("x")
    if len(sides) != 2 or any(not (side.isascii() and side.isdigit() and len(side) < 7) for side in sides):
        raise invalid("size", "size must be 'auto' or WIDTHxHEIGHT in pixels, such as '1024x1024'.")
    width, height = (int(side) for side in sides)
    most = settings.pixels(image_size)
    if width * height > most:
        raise invalid("size", f"size must have at most {most} pixels.")
    if not min(width, height) or max(width, height) > settings.max_aspect * min(width, height):
        raise invalid("size", f"The longer side of size may be at most {settings.max_aspect:g} times the shorter one.")
    return height, width


def _check_names(given: Mapping[str, Any], model: str) -> None:
    unknown = sorted(set(given) - set(_Fields.known()))
    if unknown:
        name = unknown[0] if unknown[0].isidentifier() and len(unknown[0]) <= 40 else None  # never any text back
        raise invalid(name, f"Unknown parameter: {name or 'its name is none'}.", "unknown_parameter")
    if given.get("model", model) != model:
        raise ApiError(404, f"This server has the model {model!r} only.", param="model", code="model_not_found")
    for name, allowed in ONLY.items():
        if name in given and not any(given[name] == one and type(given[name]) is type(one) for one in allowed):
            texts = " or ".join(repr(one) for one in allowed)
            raise invalid(name, f"{name} can only be {texts} here.")
    for name in IGNORED:
        if name in given and not isinstance(given[name], str):
            raise invalid(name, f"{name} must be a text.", "invalid_type")


def _pag(scale: float | None) -> float | None:
    if scale is not None and 0.0 < scale < 1.0:
        raise invalid("pag", "pag below 1 has no effect; use more than 1, or 0 to switch it off.")
    return scale


def _no_constant(name: str) -> None:
    raise ValueError("JSON has no NaN and no Infinity.")


@dataclass(frozen=True)
class _Fields:
    """Fields of a JSON object by kind."""

    given: Mapping[str, Any]

    @staticmethod
    def known() -> tuple[str, ...]:
        own = ("prompt", "model", "n", "size", "response_format", "stream", "partial_images")
        extra = ("seed", "steps", "guidance", "pag", "negative_prompt")
        return (*own, *extra, *IGNORED, *ONLY)

    def _get(self, name: str, kind: str, fits: Callable[[Any], bool]) -> Any:
        value = self.given[name]
        if not fits(value):
            raise invalid(name, f"{name} must be {kind}.", "invalid_type")
        return value

    def text(self, name: str, longest: int, default: str | None) -> str:
        if name not in self.given:
            if default is None:
                raise invalid(name, f"{name} is missing.", "missing_required_parameter")
            return default
        value: str = self._get(name, "a text", lambda one: isinstance(one, str))
        if len(value) > longest:
            raise invalid(name, f"{name} must have at most {longest} characters.", "string_above_max_length")
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
            raise invalid(name, f"{name} holds half of a surrogate pair.")
        return value

    def truth(self, name: str) -> bool:
        return name in self.given and bool(self._get(name, "true or false", lambda one: isinstance(one, bool)))

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        if name not in self.given:
            return default
        kind = f"a whole number from {low} to {high}"
        value: int = self._get(name, kind, lambda one: isinstance(one, int) and not isinstance(one, bool))
        if not low <= value <= high:
            raise invalid(name, f"{name} must be {kind}.")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        if name not in self.given:
            return None
        kind = f"a number from {low:g} to {high:g}"
        value = self._get(name, kind, lambda one: isinstance(one, int | float) and not isinstance(one, bool))
        if not low <= value <= high:
            raise invalid(name, f"{name} must be {kind}.")
        return float(value)
