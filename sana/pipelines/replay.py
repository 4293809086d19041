"""Making a picture again from the recipe in its own PNG, and saying what differs. Reading PNGs is in `images.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from sana.pipelines import batch
from sana.pipelines.images import read_recipe, save_png
from sana.pipelines.options import InferenceOptions
from sana.pipelines.prompts import PromptItem
from sana.pipelines.recipe import Recipe, differences


@dataclass
class ReplayReport:
    """What a replay found.

    Attributes:
        output: the new picture.
        pixels_differ: how many pixels are not the same.
        greatest: the greatest difference of a channel, of 255.
        differences: one line for each entry in which the new recipe is not the old one.
    """

    output: Path
    pixels_differ: int
    greatest: int
    differences: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return self.pixels_differ == 0


def replay(
    png: Path,
    *,
    model_path: str | None = None,
    config: str | None = None,
    output: Path | None = None,
    device: str | None = None,
) -> ReplayReport:
    """Makes the picture of a PNG again and compares the two.

    Args:
        png: a picture written by `scripts/inference.py`.
        model_path: weights instead of the recorded ones.
        config: YAML instead of the recorded one.
        output: where the new picture goes; `<name>.replay.png` beside the old one when None.
        device: instead of the default.

    Raises:
        ValueError: the PNG holds no recipe, or a broken one.
        CheckpointError, FetchError, TextEncoderError, NonFiniteError, OSError: the picture could not be made.
    """
    stored = read_recipe(png)
    if not stored:
        raise ValueError(f"{png} holds no recipe; only pictures written by scripts/inference.py can be made again.")
    old = Recipe.from_dict(stored)
    options = InferenceOptions(
        model_path=model_path or old.made_with.get("model_path"),
        config=config or old.made_with.get("config"),
        overrides=() if config else _texts(old.made_with.get("overrides")),
        cfg_scale=old.guidance_scale,
        pag_scale=old.pag_scale,
        interval_guidance=old.interval_guidance,
        sampling_algo=old.sampler,
        step=old.num_inference_steps,
        dtype=old.dtype,
        device=device,
        use_resolution_binning=old.use_resolution_binning,
        step_cache=old.step_cache,
        max_text_tokens=old.max_text_tokens,
        upscale_from=old.upscale_from,
        upscale_strength=old.upscale_strength,
        compile=old.compile,
        quantization=old.quantization,
        text_quantization=old.text_quantization,
        vae_tiling=old.made_with.get("vae_tiling"),
        offload=None if device == "cpu" else old.made_with.get("offload"),
    )
    item = PromptItem(
        id=png.stem, prompt=old.prompt, negative_prompt=old.negative_prompt or None, height=old.height, width=old.width
    )
    pipeline, options = batch.open_pipeline(options, [item])
    new = batch.make_recipe(pipeline, options, item, height=old.height, width=old.width, seed=old.seed)
    target = output or png.with_name(f"{png.stem}.replay.png")
    image = batch.generate(pipeline, options, [batch.Task(item, new, target)])[0]
    save_png(image, target, new.as_dict())
    return _compare(png, target, differences(stored, new.as_dict()))


def _texts(value: object) -> Sequence[str]:
    return [str(one) for one in value] if isinstance(value, list) else ()


def _compare(old: Path, new: Path, lines: list[str]) -> ReplayReport:
    with Image.open(old) as first, Image.open(new) as second:
        before, after = (np.asarray(one.convert("RGB"), dtype=np.int16) for one in (first, second))
    if before.shape != after.shape:
        lines.append(f"size: {before.shape[1]}x{before.shape[0]} before, {after.shape[1]}x{after.shape[0]} now")
        return ReplayReport(new, before.shape[0] * before.shape[1], 255, lines)
    gap = np.abs(before - after)
    return ReplayReport(new, int((gap.max(-1) > 0).sum()), int(gap.max()), lines)
