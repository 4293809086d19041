"""A finished picture as the bytes of a PNG that holds its recipe. How it is sent is in `app.py`."""

from pathlib import Path

from PIL.Image import Image

from sana.pipelines.images import png_bytes
from sana.pipelines.recipe import Recipe, environment
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.serving.job import Job
from sana.utils.dtype import dtype_name


def recipe_of(pipeline: SanaPipeline, job: Job, model: str) -> Recipe:
    """Returns the recipe of a job's picture. It names the model as clients do, not its place on this machine.

    Args:
        pipeline: that made it, its weights hashed.
        job: with one whole number as its seed.
        model: the name.
    """
    request = job.request
    assert isinstance(request.seed, int) and isinstance(request.prompt, str), "the server sets both"
    assert request.negative_prompt is None or isinstance(request.negative_prompt, str)
    shift = pipeline.config.scheduler.flow_shift if request.flow_shift is None else request.flow_shift
    low, high = request.interval_guidance
    schemes = {name: wanted.scheme for name, wanted in pipeline._quantization.items()}
    return Recipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or "",
        seed=request.seed,
        height=job.size.height,
        width=job.size.width,
        num_inference_steps=request.num_inference_steps or 1,
        sampler=request.sampler or "",
        guidance_scale=float(request.guidance_scale),
        pag_scale=float(request.pag),
        interval_guidance=(float(low), float(high)),
        flow_shift=float(shift),
        use_resolution_binning=request.binning,
        dtype=dtype_name(pipeline.dtype),
        weights=pipeline.weights_hash(),
        quantization=schemes.get("transformer"),
        text_quantization=schemes.get("text_encoder"),
        made_with={"model": model, **environment(pipeline.device)},
    )


def as_png(image: Image, recipe: Recipe | None = None) -> bytes:
    """Returns the file's bytes, as the pipeline writes it."""
    return png_bytes(image, recipe.as_dict() if recipe else None)


def model_name(pipeline: SanaPipeline) -> str:
    """Returns the public name of a pipeline's weights."""
    return public_name(pipeline.model_path)


def public_name(source: str | None) -> str:
    """Returns the last part of where weights come from: a folder's, a file's or a repository's name."""
    name = Path(str(source or "").rstrip("/\\")).name
    for ending in (".safetensors", ".pth", ".bin", ".pt"):
        name = name.removesuffix(ending)
    return name or "sana"
