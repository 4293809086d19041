"""A request that a plan makes in several calls: cut into requests of fewer pictures, and their results joined."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sana.pipelines import inputs

if TYPE_CHECKING:
    from sana.pipelines.request import Request
    from sana.pipelines.sana_pipeline import SanaPipeline

DRAWS_ONCE = ("flow_dpm-solver", "flow_euler", "dpm-solver")  # samplers that draw nothing after the first noise


def generate_in_calls(pipeline: "SanaPipeline", request: "Request", most: int) -> Any:
    """Makes the pictures of a request, at most so many in each call of `pipeline.generate`.

    The pictures are those of one call (on a CPU in float32 to the bit), but where neither seeds nor generators are
    given: then the same prompts get other random numbers. A callback sees the steps of every call.

    Args:
        pipeline: makes them.
        request: of any number of pictures.
        most: pictures of one call.

    Raises:
        ValueError: one generator is given for all pictures, and its numbers would come in another order.
    """
    images = request.prompt_count * request.num_images_per_prompt
    if images <= most:
        return pipeline.generate(request)
    calls = -(-images // most)
    bounds = [index * images // calls for index in range(calls + 1)]
    results = [pipeline.generate(part) for part in _parts(pipeline, request, images, bounds)]
    return _joined(results)


def _parts(pipeline: "SanaPipeline", request: "Request", images: int, bounds: list[int]) -> Iterator["Request"]:
    """Yields requests of the images between the bounds, each with all that belongs to an image."""
    generators, latents = inputs.as_generators(request.generator, request.seed, images), request.latents
    if isinstance(generators, torch.Generator):
        latents, generators = _noise(pipeline, request, generators, images), None
    prompts: Any = None if request.prompt is None else inputs.as_prompts(request.prompt)
    negatives: Any = request.negative_prompt
    if negatives is not None:
        negatives = inputs.as_negative_prompts(negatives, request.prompt_count)
    copies, shared = request.num_images_per_prompt, request.negative_prompt_embeds
    by_prompt = {
        "prompt": prompts,
        "negative_prompt": negatives,
        "prompt_embeds": request.prompt_embeds,
        "prompt_attention_mask": request.prompt_attention_mask,
        "negative_prompt_embeds": shared if shared is not None and len(shared) > 1 else None,
    }
    by_image = {"generator": generators, "latents": latents}
    for start, stop in pairwise(bounds):
        rows = [index // copies for index in range(start, stop)]
        changes: dict[str, Any] = {name: _rows(values, rows) for name, values in by_prompt.items()}
        changes |= {name: None if values is None else values[start:stop] for name, values in by_image.items()}
        if changes["negative_prompt_embeds"] is None:
            changes["negative_prompt_embeds"] = shared
        yield replace(request, num_images_per_prompt=1, seed=None, **changes)


def _rows(values: Any, rows: list[int]) -> Any:
    """Returns those of a list or a tensor; None of None."""
    if values is None:
        return None
    return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]


def _noise(pipeline: "SanaPipeline", request: "Request", generator: torch.Generator, images: int) -> Tensor | None:
    """Returns the noise that one call would draw from its one generator.

    Raises:
        ValueError: the generator serves the steps too, or a small picture that comes first.
    """
    sampler = request.sampler or pipeline.config.scheduler.vis_sampler
    if sampler not in DRAWS_ONCE or request.upscale_from is not None:
        raise ValueError(
            f"{images} pictures are made in several calls, as the plan says, and {sampler} with one generator would "
            "draw other numbers for them: give seed, or a list with one generator for each picture."
        )
    if request.latents is not None:
        return request.latents
    factor = pipeline.autoencoder.downsample_factor
    size = inputs.plan_size(
        request.height,
        request.width,
        factor=factor,
        image_size=pipeline.config.model.image_size,
        binning=request.binning,
    )
    shape = (images, pipeline.autoencoder.latent_channels, size.model_height // factor, size.model_width // factor)
    return inputs.initial_noise(
        None, generator, shape, images_per_prompt=request.num_images_per_prompt, device=pipeline.device
    )


def _joined(results: list[Any]) -> Any:
    """Returns tensors, arrays or lists of pictures as one."""
    join: Callable[[list[Any]], Any] = torch.cat
    if isinstance(results[0], np.ndarray):
        join = np.concatenate
    elif isinstance(results[0], list):
        return [picture for result in results for picture in result]
    return join(results)
