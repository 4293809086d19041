"""Opening a pipeline for a server: which settings go, and what many pictures in work need in memory at a time."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from sana.config import SanaConfig
from sana.ops.backend import plain_kind
from sana.pipelines import batch, inputs
from sana.pipelines.batch_memory import apply_settings
from sana.pipelines.memory.networks import build_empty
from sana.pipelines.memory.stages import MemoryModel
from sana.pipelines.options import InferenceOptions
from sana.pipelines.plan import MemoryLimitError, Plan, make_plan
from sana.pipelines.plan_request import AUTO, NONE, PlanRequest, format_memory, make_job, parse_memory
from sana.pipelines.plan_search import describe
from sana.pipelines.plan_stages import MakeModel
from sana.pipelines.prompts import PromptItem
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.text_features import TextFeatures
from sana.serving.evaluation import KEPT_TEXTS
from sana.serving.settings import ServerSettings
from sana.utils.logging import get_logger

logger = get_logger(__name__)

JOINED_ROWS = 64  # of one forward, see `Evaluator`
SHAPES = 33  # aspects that are tried for the largest picture
SLOWER = {"none": 0, "model": 1, "group": 1, "sequential": 2}  # every round brings a network, whole or in parts
PICTURES = 3  # float32 pictures at a time while one is brought to the size asked for


def check_model(options: InferenceOptions) -> None:
    """Checks what can be checked of a model's options before anything is loaded.

    Raises:
        ValueError: an option cannot take effect in a server.
    """
    if options.compile != "off":
        raise ValueError("compile cannot take effect in the server: it steps many pictures, a compiled loop is one.")
    if options.upscale_from is not None:
        raise ValueError("upscale_from cannot take effect in the server: a picture in two parts cannot be stepped.")


def open_model(
    options: InferenceOptions, settings: ServerSettings, *, lower: bool = False
) -> tuple[SanaPipeline, ServerSettings]:
    """Returns the pipeline that the options name, with weights, and the settings that it can be served with.

    With `max_vram` the memory is planned before weights are loaded: for `max_active` pictures in work, each as large
    and as guided as a client may ask for.

    Args:
        options: which model, on what device, in what dtype, how its weights are kept.
        settings: of the server.
        lower: whether fewer pictures may be in work where so many do not fit, or only with slower or inexact settings.

    Raises:
        ValueError: a setting cannot take effect; nothing was loaded.
        ConfigError, FetchError, CheckpointError: config or weights are missing or broken.
        MemoryLimitError: the pictures do not fit; nothing was loaded.
    """
    check_model(options)
    if options.max_vram is None:
        pipeline, _ = batch.open_pipeline(options, [PromptItem(id="any", prompt="any")])
        return pipeline, settings
    pipeline, weights = batch.name_pipeline(options)
    plan, active = plan_serving(pipeline, options, settings, lower=lower)
    apply_settings(pipeline, options, plan)
    return pipeline.from_pretrained(weights), replace(settings, max_active=active)


def plan_serving(
    pipeline: SanaPipeline, options: InferenceOptions, settings: ServerSettings, *, lower: bool
) -> tuple[Plan, int]:
    """Returns the settings of memory by which the largest pictures fit, and how many may be in work.

    Args:
        pipeline: needs no weights.
        options, settings, lower: see `open_model`.

    Raises:
        ValueError: a setting cannot take effect.
        MemoryLimitError: they do not fit.
    """
    counts = [settings.max_active, *_fewer(settings.max_active)]
    models = _memory_models(pipeline)
    planned: dict[int, Plan] = {}
    refused: MemoryLimitError | None = None
    for count in counts:
        if refused is not None and planned and not lower:
            break  # what would fit is known
        try:
            planned[count] = _plan(pipeline, options, settings, count, models)
        except MemoryLimitError as error:
            refused = refused or error
            continue
        if not lower or _harm(planned[count]) == 0:
            break
    if not planned or (not lower and settings.max_active not in planned):
        assert refused is not None, "what is not planned was refused"
        raise _explained(refused, options, settings, max(planned, default=0))
    active = min(planned, key=lambda count: (_harm(planned[count]), -count))
    plan = planned[active]
    if active < settings.max_active:
        logger.warning("max_active is %d, not %d, to fit into %s", active, settings.max_active, options.max_vram)
    words = describe(plan.settings, make_job(pipeline.config, plan.request))
    needed = format_memory(plan.peak + plan.request.margin_bytes, up=True)
    logger.info("up to %d pictures in work: %s; at most %s of %s", active, words, needed, options.max_vram)
    if not plan.exact:
        logger.warning("to fit into %s, weights are quantised: pictures change a little", options.max_vram)
    return plan, active


def _fewer(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _harm(plan: Plan) -> int:
    """Returns how bad a plan is by what was not asked for: 0, slow 1 or 2, inexact 3."""
    chosen, asked = plan.settings, plan.request
    schemes = (chosen.quantization, asked.quantization), (chosen.text_quantization, asked.text_quantization)
    if any(have is not None and want == AUTO for have, want in schemes):
        return 3
    return SLOWER[chosen.offload] if asked.offload == AUTO else 0


def _memory_models(pipeline: SanaPipeline) -> MakeModel:
    """Returns a maker of memory models that several plans share: nothing is computed twice."""

    @cache
    def make(quantization: str | None, text_quantization: str | None) -> Any:
        schemes = {"quantization": quantization, "text_quantization": text_quantization}
        made = MemoryModel(pipeline.config, device=pipeline.device.type, dtype=pipeline.dtype, **schemes)
        return SimpleNamespace(
            weights=cache(made.weights),
            encode_text=cache(made.encode_text),
            denoise=cache(made.denoise),
            decode=cache(made.decode),
        )

    return make


def _plan(
    pipeline: SanaPipeline, options: InferenceOptions, settings: ServerSettings, count: int, models: MakeModel
) -> Plan:
    """Plans so many of the largest pictures; on a CPU one at a time is computed, and all are held."""
    config, device = pipeline.config, pipeline.device.type
    size = largest_size(config, settings)
    sprint = config.model.model.startswith("SanaMSCM")
    pag = not sprint and plain_kind(config.model.attn_type)[0] == "linear" and bool(config.model.pag_applied_layers)
    branches = 1 if sprint else 3 if pag else 2
    joined = 1 if device == "cpu" else min(count, JOINED_ROWS // branches)
    held = held_bytes(config, settings, size, pictures=count, branches=branches, itemsize=pipeline.dtype.itemsize)
    margin = held["cpu" if device == "cpu" else "joined"]
    limit = parse_memory("max_vram", options.max_vram or 0)
    if margin >= limit:
        raise MemoryLimitError("", needed=margin, allowed=limit, stage="what is held between steps")
    try:
        request = PlanRequest(
            size.model_height, size.model_width, joined, device, pipeline.dtype, options.max_vram, margin, pag=pag,
            use_resolution_binning=False, tiling=_tiling(options), offload=options.offload or AUTO, split=False,
            quantization=options.quantization or AUTO, text_quantization=options.text_quantization or AUTO,
        )  # fmt: skip
        return make_plan(config, request, make_model=models)
    except MemoryLimitError as error:
        raise MemoryLimitError(str(error), needed=error.needed + margin, allowed=limit, stage=error.stage) from error


def _tiling(options: InferenceOptions) -> Any:
    return AUTO if options.vae_tiling is None else options.vae_tiling or NONE


def _explained(
    refused: MemoryLimitError, options: InferenceOptions, settings: ServerSettings, fits: int
) -> MemoryLimitError:
    """Returns the refusal in the words of the server's options."""
    what = f"{settings.max_active} pictures in work" if settings.max_active > 1 else "One picture in work"
    remedy = f"--max_active={fits} does" if fits else "use more memory, a lower --max_pixels, or --max_active=1"
    verb = "do" if settings.max_active > 1 else "does"
    text = (
        f"{what} of the largest size and guidance that clients may ask for {verb} not fit into {options.max_vram}: "
        f"{refused.stage} needs {format_memory(refused.needed, up=True)}; {remedy}."
    )
    return MemoryLimitError(text, needed=refused.needed, allowed=refused.allowed, stage=refused.stage)


def largest_size(config: SanaConfig, settings: ServerSettings) -> inputs.ImageSize:
    """Returns the size, of those that clients may ask for, at which the model makes most pixels."""
    own, factor, most = (
        config.model.image_size,
        config.vae.vae_downsample_rate,
        settings.pixels(config.model.image_size),
    )
    sides: list[tuple[int, int]] = [(own, own)]
    for place in range(SHAPES):
        aspect = settings.max_aspect ** (2 * place / (SHAPES - 1) - 1)
        height = math.isqrt(int(most * aspect))
        sides.append((height, most // max(height, 1)))
        height = max(height // factor, 1) * factor
        sides.append((height, most // height // factor * factor))
    found = [size for height, width in sides if (size := _size(height, width, factor, own)) is not None]
    return max(found, key=lambda size: (size.model_height * size.model_width, size.height * size.width))


def _size(height: int, width: int, factor: int, own: int) -> inputs.ImageSize | None:
    try:
        return inputs.plan_size(height, width, factor=factor, image_size=own, binning=True)
    except ValueError:
        return None


def held_bytes(
    config: SanaConfig,
    settings: ServerSettings,
    size: inputs.ImageSize,
    *,
    pictures: int,
    branches: int,
    itemsize: int,
) -> dict[str, int]:
    """Returns what lies in memory between steps beyond what one call of the pipeline holds, at most.

    Every picture in work has texts as keys and values, and tables of its steps. Where pictures are joined, so are their
    texts, and the last few groups are kept. Encoded texts are remembered. A picture may be made larger at its end.

    Args:
        config: of the model.
        settings: of the server.
        size: of the largest picture.
        pictures: in work.
        branches: rows of a picture in the transformer.
        itemsize: bytes of a number of the transformer.

    Returns:
        Bytes for "cpu", where every picture is computed alone, and for "joined".
    """
    transformer: Any = build_empty("transformer", config)
    depth, width = transformer.architecture.depth, transformer.architecture.hidden_size
    tokens = config.text_encoder.model_max_length
    texts = pictures * branches * 2 * depth * width * tokens * itemsize
    times = pictures * 6 * depth * width * settings.max_steps * itemsize
    known = TextFeatures()
    features = min(known.max_bytes, known.size * tokens * config.text_encoder.caption_channels * itemsize)
    enlarged = PICTURES * 3 * 4 * settings.pixels(config.model.image_size) if size.binned else 0
    alone = texts + times + features + enlarged
    return {"cpu": alone, "joined": alone + (KEPT_TEXTS + 2) * texts}  # kept, being made, and in the order of rows
