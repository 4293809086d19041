"""A large picture that starts from a small one of the same prompt: sizes, the start, fewer steps. No sampler is here.

Sampled far above the size it was trained at, Sana (which has no position embedding) repeats objects instead of
enlarging them. So the small picture decides what is where, and the large one begins between noise and it: SDEdit (Meng
et al. 2022, section 3) on the flow-matching process. What that is worth is measured in `asset/docs/upscaling.md`.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.diffusion.flow import add_noise
from sana.diffusion.sampler import Sampler
from sana.pipelines import inputs
from sana.pipelines.denoise import check_finite

if TYPE_CHECKING:
    from sana.pipelines.request import Request
    from sana.pipelines.sana_pipeline import SanaPipeline

Drawn = torch.Generator | list[torch.Generator] | None  # what `inputs.as_generators` returns

DEFAULT_STRENGTH = 0.5


def check_upscale(upscale_from: int | None, strength: float | None, latents: Tensor | None) -> None:
    """Checks the two options of a `Request`.

    Raises:
        ValueError: one is out of range or cannot take effect.
    """
    if upscale_from is None:
        if strength is not None:
            raise ValueError("upscale_strength cannot take effect without upscale_from; give both.")
        return
    inputs.check_count("upscale_from", upscale_from, inputs.MAX_SIDE)
    if strength is not None and not 0.0 < inputs.check_number("upscale_strength", strength, 0.0, 1.0) < 1.0:
        raise ValueError(f"upscale_strength must lie between 0 and 1, ends excluded, not {strength:g}.")
    if latents is not None:
        raise ValueError("latents and upscale_from were both given, and both say what to start from; give one of them.")


def small_size(height: int, width: int, upscale_from: int, factor: int) -> tuple[int, int]:
    """Returns (height, width) of the small picture: about the area of a square and the large picture's shape.

    Args:
        height: of the large picture, in pixels.
        width: of the large picture, in pixels.
        upscale_from: side of the square, in pixels.
        factor: the autoencoder's downsampling factor; both sides are multiples of it.

    Raises:
        ValueError: the small picture would not be smaller.
    """
    scale = upscale_from / math.sqrt(height * width)
    small_height, small_width = (max(1, int(side * scale / factor + 0.5)) * factor for side in (height, width))
    if small_height * small_width >= height * width or small_height > height or small_width > width:
        raise ValueError(
            f"upscale_from {upscale_from} makes no picture smaller than the {height}x{width} (height x width) that is "
            "asked for; use less, or a larger height and width."
        )
    return small_height, small_width


def remaining_times(times: Tensor, strength: float) -> Tensor:
    """Returns the noise levels from the one nearest to `strength` on: never all of them, and at least one step.

    Args:
        times: (N + 1,) falling, N > 1; the first is noise alone, the last 0.
        strength: in (0, 1).

    Raises:
        ValueError: there is no level between the first and the last.
    """
    if len(times) < 3:
        raise ValueError("upscale_from needs at least 2 num_inference_steps: one step starts from noise alone.")
    nearest = int((times[1:-1] - strength).abs().argmin())
    return times[nearest + 1 :]


def start_from_small(
    pipeline: "SanaPipeline", request: "Request", sampler: Sampler, size: inputs.ImageSize, generators: Drawn
) -> tuple[Sampler, Tensor]:
    """Makes the small pictures of a request with `upscale_from`, and what the large ones begin with.

    The small picture is the one that the same request makes at that size, to the bit: its noise is drawn first. It is
    decoded, enlarged (bicubic) and encoded, for latents are no picture that can be enlarged. A caller's callback sees
    the steps of both, first those of the small pictures.

    Args:
        pipeline: makes them.
        request: with its number of steps.
        sampler: of the large pictures.
        size: of the large pictures.
        generators: see `inputs.as_generators`.

    Returns:
        The sampler whose times are the remaining ones, and latents (B, C, h, w) float32 at the first of them.

    Raises:
        ValueError: the sampler does not walk the flow, or the small picture is not smaller.
    """
    if sampler.prediction != "velocity":
        raise ValueError("upscale_from works with samplers of the flow (flow_dpm-solver, flow_euler) only.")
    assert request.upscale_from is not None and request.num_inference_steps is not None
    strength = DEFAULT_STRENGTH if request.upscale_strength is None else request.upscale_strength
    flow_shift = request.flow_shift if request.flow_shift is not None else pipeline.config.scheduler.flow_shift
    times = remaining_times(sampler.times(request.num_inference_steps, flow_shift=flow_shift), strength)
    factor = pipeline.autoencoder.downsample_factor
    height, width = small_size(size.model_height, size.model_width, request.upscale_from, factor)
    small = pipeline.generate(
        replace(
            request,
            height=height,
            width=width,
            upscale_from=None,
            upscale_strength=None,
            use_resolution_binning=False,
            seed=None,
            generator=generators,
            output_type="latent",
        )
    )
    latents = _enlarge(pipeline, small, size, generators)
    noise = inputs.initial_noise(
        None,
        generators,
        (len(latents), latents.shape[1], latents.shape[2], latents.shape[3]),
        images_per_prompt=request.num_images_per_prompt,
        device=latents.device,
    )
    return replace(sampler, times=lambda num_inference_steps, **options: times), add_noise(latents, noise, times[0])


def _enlarge(pipeline: "SanaPipeline", latents: Tensor, size: inputs.ImageSize, generators: Drawn) -> Tensor:
    """Latents of the pictures of `latents` at the large size, float32. One picture at a time: they are large."""
    autoencoder = pipeline.autoencoder
    images = pipeline.decode(latents)
    enlarged = []
    with pipeline.stage("autoencoder"):
        for index, image in enumerate(images.split(1)):
            generator = generators[index] if isinstance(generators, list) else generators
            large = F.interpolate(image, (size.model_height, size.model_width), mode="bicubic").clamp(-1, 1)
            encoded = autoencoder.encode(large, generator).float()
            network = getattr(autoencoder, "encoder", autoencoder)
            check_finite(encoded, network, "autoencoder's encoder", large.to(autoencoder.dtype))
            enlarged.append(encoded)
    return torch.cat(enlarged)
