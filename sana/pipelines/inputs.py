"""What one call of the pipeline asks for, checked and spread out to one entry an image. No model runs here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sana.data.aspect_ratio import ASPECT_RATIOS, classify_height_width_bin
from sana.utils.seed import MAX_SEED, randn

MAX_SIDE = 16384  # pixels; the largest table holds 8192
MAX_STEPS = 10_000

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class ImageSize:
    """The size asked for and the size the model works at, in pixels.

    Attributes:
        height, width: what the caller gets.
        model_height, model_width: what is generated; larger or smaller when the size was binned.
    """

    height: int
    width: int
    model_height: int
    model_width: int

    @property
    def binned(self) -> bool:
        """Whether the generated picture must be resized and cropped."""
        return (self.height, self.width) != (self.model_height, self.model_width)


def plan_size(height: int | None, width: int | None, *, factor: int, image_size: int, binning: bool) -> ImageSize:
    """Checks an image size and finds the one to generate.

    Args:
        height: asked for, in pixels; None for `image_size`.
        width: as `height`.
        factor: the autoencoder's downsampling factor.
        image_size: the resolution the model was trained for; names the table of trained shapes.
        binning: generate the trained shape whose height / width ratio is nearest, then resize and crop. Without effect
            where there is no table for `image_size`: then the very size is generated.

    Raises:
        ValueError: a side is not a whole number in [factor, 16384], or no multiple of factor while binning is off.
    """
    height, width = (image_size if side is None else side for side in (height, width))
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, int) or not factor <= side <= MAX_SIDE:
            raise ValueError(f"{name} must be a whole number of pixels from {factor} to {MAX_SIDE}, not {side!r}.")
    table = ASPECT_RATIOS.get(f"ASPECT_RATIO_{image_size}_TEST")
    if not binning or table is None:
        for name, side in (("height", height), ("width", width)):
            if side % factor:
                raise ValueError(
                    f"{name} {side} is not a multiple of {factor}; use {side // factor * factor} or "
                    f"{-(-side // factor) * factor}" + (", or use_resolution_binning=True." if table else ".")
                )
        return ImageSize(height, width, height, width)
    # The 256 table has sides such as 144 that an autoencoder of factor 32 cannot make: take the nearest it can.
    bin_height, bin_width = (
        (int(side) + factor // 2) // factor * factor for side in classify_height_width_bin(height, width, table)
    )
    return ImageSize(height, width, bin_height, bin_width)


def check_number(name: str, value: float, low: float, high: float) -> float:
    """Returns `value` as a float.

    Raises:
        ValueError: it is not a finite number in [low, high].
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, not {value!r}.")
    return float(value)


def check_count(name: str, value: int, high: int) -> int:
    """Returns `value`.

    Raises:
        ValueError: it is not a whole number in [1, high].
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name} must be a whole number from 1 to {high}, not {value!r}.")
    return value


def as_prompts(prompt: str | Sequence[str]) -> list[str]:
    """Returns a list of prompts.

    Raises:
        ValueError: the list is empty or holds something that is no text.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or any(not isinstance(one, str) for one in prompts):
        raise ValueError(f"prompt must be a text or a list of at least one text, not {prompt!r}.")
    return prompts


def as_negative_prompts(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """Returns one negative prompt for each of `count` prompts; the empty text where there is none.

    Raises:
        ValueError: a list of another length.
    """
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    negatives = as_prompts(negative_prompt)
    if len(negatives) != count:
        raise ValueError(
            f"{len(negatives)} negative prompts were given for {count} prompts; give one, or one for each."
        )
    return negatives


def as_generators(
    generator: Generators, seed: int | Sequence[int] | None, images: int
) -> torch.Generator | list[torch.Generator] | None:
    """Returns the random numbers of a call: one generator for each image wherever the caller's choice allows it.

    A seed makes CPU generators, so that a seed gives the same noise on every device.

    Args:
        generator: one for the whole batch (used up image after image), or one for each image.
        seed: image i uses seed + i; a list gives each image its own.
        images: number of images of the call.

    Raises:
        ValueError: both are given, a list has another length, or a seed is not in [0, 2**63).
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator were both given; give one of them.")
    if seed is None:
        if generator is None or isinstance(generator, torch.Generator):
            return generator
        generators = list(generator)
        if len(generators) != images:
            raise ValueError(f"{len(generators)} generators were given for {images} images; give one for each image.")
        return generators
    seeds = [seed + index for index in range(images)] if isinstance(seed, int) else list(seed)
    if len(seeds) != images:
        raise ValueError(f"{len(seeds)} seeds were given for {images} images; give one for each image.")
    for one in seeds:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= MAX_SEED:
            raise ValueError(f"seed must be a whole number in [0, 2**63), not {one!r}.")
    return [torch.Generator().manual_seed(one) for one in seeds]


def initial_noise(
    latents: torch.Tensor | None,
    generators: torch.Generator | list[torch.Generator] | None,
    shape: tuple[int, int, int, int],
    *,
    images_per_prompt: int,
    device: torch.device,
) -> torch.Tensor:
    """Returns the noise a sampler starts from, float32.

    Args:
        latents: the caller's own noise, or None.
        generators: see `as_generators`. A single one is used up prompt after prompt, as the released pipeline does.
        shape: (B, C, H, W) of the latents.
        images_per_prompt: rows that belong to one prompt.
        device: where the noise goes.

    Raises:
        ValueError: `latents` has another shape or is not finite.
    """
    if latents is not None:
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"latents must have the shape {shape} for this size and number of images, not {tuple(latents.shape)}."
            )
        if not torch.isfinite(latents).all():
            raise ValueError("latents hold a value that is not finite.")
        return latents.to(device=device, dtype=torch.float32)
    if isinstance(generators, list):
        return randn(shape, generators, device=device)
    rows = (images_per_prompt, *shape[1:])
    return torch.cat([randn(rows, generators, device=device) for _ in range(shape[0] // images_per_prompt)])
