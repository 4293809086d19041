"""What the options of a list of pictures say about memory and speed: planned, then given to the pipeline.

The plan itself is in `plan.py`; `batch.py` makes the pictures.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sana.pipelines.inputs import ImageSize
from sana.pipelines.options import InferenceOptions
from sana.pipelines.plan import OFFLOADERS, Plan
from sana.pipelines.plan_request import AUTO, NONE, PlanRequest, format_memory, make_job
from sana.pipelines.plan_search import describe
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from sana.pipelines.sana_pipeline import SanaPipeline

logger = get_logger(__name__)


def plan_memory(pipeline: "SanaPipeline", options: InferenceOptions, sizes: Sequence[ImageSize]) -> Plan | None:
    """Plans the largest picture of a list before weights are loaded; logs the plan in one line.

    Without `max_vram` nothing is planned, and the settings that were given are checked.

    Args:
        pipeline: needs no weights.
        options: of the run.
        sizes: of all its pictures.

    Returns:
        The plan; None without `max_vram`.

    Raises:
        ValueError: a setting cannot take effect on this device.
        MemoryLimitError: nothing fits.
    """
    settings = {
        "offload": options.offload or AUTO,
        "quantization": options.quantization or AUTO,
        "text_quantization": options.text_quantization or AUTO,
        "tiling": _tile(options),
    }
    if options.max_vram is None:
        if any(value != AUTO for value in settings.values()):
            PlanRequest(device=pipeline.device.type, **settings)
        return None
    size, count = _largest(sizes)
    job: dict[str, Any] = {
        "max_vram": options.max_vram,
        "guidance": None if any(scale != 1 for scale in _values(options, "cfg_scale")) else False,
        "pag": any(scale > 1 for scale in _values(options, "pag_scale")),
        "use_resolution_binning": options.use_resolution_binning,
        "upscale_from": options.upscale_from,
    }
    plan = pipeline.plan(size.height, size.width, min(options.bs, count), **job, **settings)
    logger.info("%s", one_line(plan, pipeline))
    if not plan.exact:
        logger.warning("to fit into %s, weights are quantised: pictures change a little", options.max_vram)
    return plan


def one_line(plan: Plan, pipeline: "SanaPipeline") -> str:
    """Returns a plan as "what: settings; at most x of y"."""
    words = describe(plan.settings, make_job(pipeline.config, plan.request))
    limit = "" if plan.limit is None else f" of {format_memory(plan.limit)}"
    return f"{plan.headline}: {words}; at most {format_memory(plan.peak, up=True)}{limit}"


def planned_options(options: InferenceOptions, plan: Plan | None) -> InferenceOptions:
    """Returns the options with what a plan chose, so that recipes name it."""
    if plan is None:
        return options
    chosen = plan.settings
    return replace(
        options,
        bs=chosen.batch,
        quantization=chosen.quantization or NONE,
        text_quantization=chosen.text_quantization or NONE,
        offload=chosen.offload,
        vae_tiling=chosen.tile or False,
    )


def apply_settings(pipeline: "SanaPipeline", options: InferenceOptions, plan: Plan | None) -> None:
    """Gives a pipeline what a plan or the options say, before it has weights: they are never there as a whole.

    Raises:
        ValueError: a setting cannot take effect.
        QuantizationUnavailableError: the device or a package for a scheme is missing.
    """
    if plan is not None:
        plan.apply(pipeline)
        return
    schemes = scheme(options.quantization), scheme(options.text_quantization)
    if any(schemes):
        pipeline.quantize(transformer=schemes[0], text_encoder=schemes[1])
    if options.offload is not None:
        OFFLOADERS[options.offload](pipeline)
    tile = options.vae_tiling
    if tile is True:
        pipeline.autoencoder.enable_tiling()
    elif tile is False:
        pipeline.autoencoder.disable_tiling()
    elif tile is not None:
        pipeline.autoencoder.enable_tiling(tile, tile, tile, tile)


def scheme(name: str | None) -> str | None:
    """Returns the scheme of an option; None for exact weights."""
    return None if name in (None, NONE) else name


def _tile(options: InferenceOptions) -> Any:
    if options.vae_tiling is None or options.vae_tiling is True:
        return AUTO
    return options.vae_tiling or NONE


def _values(options: InferenceOptions, key: str) -> Sequence[float]:
    """Returns every value that an option takes in the run."""
    return options.ablation_selections or () if options.ablation_key == key else (getattr(options, key),)


def _largest(sizes: Sequence[ImageSize]) -> tuple[ImageSize, int]:
    """Returns the largest size, and how many pictures one call may hold: as many as there are of any one size."""
    counts: dict[tuple[int, int], int] = {}
    for size in sizes:
        counts[size.height, size.width] = counts.get((size.height, size.width), 0) + 1
    return max(sizes, key=lambda size: size.model_height * size.model_width), max(counts.values())
