"""Recipes of the page: what they name of the server, and how a dropped PNG becomes settings. Nothing is drawn here."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from app.wishes import Limits, WishError, read_wish
from sana.pipelines.batch_memory import scheme
from sana.pipelines.images import DAMAGED, read_recipe
from sana.pipelines.options import BUNDLED_MODEL, InferenceOptions, bundled
from sana.pipelines.recipe import Recipe
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.utils.dtype import dtype_name

MAX_BYTES = 2**26  # of a dropped file
MAX_PIXELS = 8192 * 8192
SIGNATURE = b"\x89PNG\r\n\x1a\n"
NO_RECIPE = "This PNG holds no recipe; only pictures made by Sana, unchanged since, hold one."
NO_PNG = "This file is no PNG picture; drop a PNG that was downloaded here."
BROKEN = "This picture is damaged or its recipe is; its settings cannot be restored."
# What decides a picture beside the page's fields: shown where a dropped picture differs from what is made here.
FIXED = {
    "sampler": "sampler", "flow_shift": "flow shift", "dtype": "precision", "interval_guidance": "guidance interval",
    "use_resolution_binning": "resolution binning", "step_cache": "step cache", "max_text_tokens": "text tokens",
    "upscale_from": "upscaling", "quantization": "quantization", "text_quantization": "text quantization",
    "compile": "compilation", "weights": "weights",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How the pipeline was opened, as recipes say it.

    Attributes:
        opened_with: the options; those that a wish decides are replaced by it.
    """

    opened_with: InferenceOptions

    @classmethod
    def of(cls, pipeline: SanaPipeline, opened_with: InferenceOptions | None) -> "Settings":
        """Returns the settings of a pipeline; without options those that its weights alone give."""
        return cls(opened_with or InferenceOptions(model_path=pipeline.model_path))

    def here(self, pipeline: SanaPipeline, weights: str | None) -> dict[str, Any]:
        """Returns what decides a picture here beside the page's fields, by the recipe's names.

        Args:
            pipeline: that draws.
            weights: their hash; None where it is not known yet, then it is left out.
        """
        options, scheduler = self.opened_with, pipeline.config.scheduler
        low, high = options.interval_guidance
        known = {
            "sampler": options.sampling_algo or scheduler.vis_sampler,
            "flow_shift": float(scheduler.flow_shift),
            "dtype": dtype_name(pipeline.dtype),
            "interval_guidance": (float(low), float(high)),
            "use_resolution_binning": options.binning,
            "step_cache": float(options.step_cache),
            "max_text_tokens": options.max_text_tokens,
            "upscale_from": options.upscale_from,
            "quantization": scheme(options.quantization),
            "text_quantization": scheme(options.text_quantization),
            "compile": options.compile,
        }
        return known if weights is None else {**known, "weights": weights}

    def public(self, made_with: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a recipe's `made_with` without the folders of this machine: strangers download it.

        Weights on a hub and relative paths stay, of absolute paths the last part; the bundled model is None, as
        where nothing was named. `sana replay --model_path` takes the weights that a picture no longer says.
        """
        public = {name: _without_folders(value) for name, value in made_with.items()}
        model_path = made_with.get("model_path")
        if self.opened_with.config is None and model_path and _same_place(model_path, bundled(BUNDLED_MODEL)):
            public["model_path"] = None
        public["overrides"] = [_public_override(one) for one in made_with.get("overrides", ())]
        return public


def _without_folders(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts else value


def _same_place(name: str, path: Path) -> bool:
    return "://" not in name and Path(name).expanduser().resolve() == path.resolve()


def _public_override(override: str) -> str:
    name, equals, value = str(override).partition("=")
    return f"{name}{equals}{_without_folders(value)}"


def read_dropped(path: str | Path) -> Recipe:
    """Returns the recipe of a file that somebody dropped, of whatever kind it is.

    Raises:
        WishError: it is no PNG, too large, damaged, or holds no recipe.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise WishError("The file did not arrive; drop it again.") from error
    if size > MAX_BYTES:
        raise WishError(f"The file has {size / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are read.")
    if len(head) < 24 or not head.startswith(SIGNATURE) or head[12:16] != b"IHDR":
        raise WishError(NO_PNG)
    width, height = struct.unpack(">II", head[16:24])
    if width * height > MAX_PIXELS:  # said before anything is decoded
        raise WishError(f"The picture says it has {width} x {height} pixels; that is more than are read here.")
    try:
        with Image.open(path) as image:  # a second header counts for Pillow
            if image.width * image.height > MAX_PIXELS:
                raise WishError(BROKEN)
        stored = read_recipe(path)
    except DAMAGED as error:
        raise WishError(BROKEN) from error
    if stored is None:
        raise WishError(BROKEN if _mentions_recipe(path) else NO_RECIPE)
    try:
        return Recipe.from_dict(stored)
    except (ValueError, TypeError, KeyError) as error:
        raise WishError(BROKEN) from error


def _mentions_recipe(path: Path) -> bool:
    """Returns whether a file that gave no recipe has the name of one in it, or ends before its end."""
    content = path.read_bytes()
    return b"iTXtsana\0" in content or b"IEND" not in content[-16:]


def restore_fields(recipe: Recipe, limits: Limits) -> dict[str, Any]:
    """Returns the page's fields that make the picture of a recipe.

    The style is none: the recipe's prompt has the style's words already.

    Raises:
        WishError: the recipe asks for something that this page cannot make.
    """
    fields = {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "style": None,
        "width": recipe.width,
        "height": recipe.height,
        "steps": recipe.num_inference_steps,
        "guidance": recipe.guidance_scale,
        "pag": 1.0 if recipe.pag_scale == 0 else recipe.pag_scale,
        "seed": recipe.seed,
        "randomise": False,
        "number": 1,
    }
    try:
        wish = read_wish(fields, limits)
    except WishError as error:
        raise WishError(f"This page cannot make that picture: {str(error)[0].lower()}{str(error)[1:]}") from error
    aspect, side = limits.presets.find(wish.width, wish.height)
    kept = {"prompt": wish.prompt, "negative_prompt": wish.negative_prompt, "steps": wish.steps}
    return {**fields, **kept, "aspect": aspect, "image_size": side or limits.presets.first}


def what_differs(recipe: Recipe, here: Mapping[str, Any]) -> list[str]:
    """Returns the names of what else decides a picture and is not the same here; see `Settings.here`."""
    return [FIXED[key] for key, value in here.items() if getattr(recipe, key) != value]
