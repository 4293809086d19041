"""A list of prompts to a folder of pictures: names, seeds, sharing between processes, skipping what is done, the index.

How one batch is generated is in `sana_pipeline.py`; prompt files are read in `prompts.py`, PNGs written in `images.py`.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from sana.models.text_encoder import require_text_encoder
from sana.pipelines import inputs, loading
from sana.pipelines.batch_memory import apply_settings, plan_memory, planned_options, scheme
from sana.pipelines.images import contact_sheet, read_recipe, save_png
from sana.pipelines.options import BUNDLED_PROMPTS, InferenceOptions, bundled
from sana.pipelines.prompts import PromptItem, read_prompts, safe_name
from sana.pipelines.recipe import Recipe, environment
from sana.pipelines.sana_pipeline import DEFAULT_STEPS, SanaPipeline
from sana.pipelines.upscale import DEFAULT_STRENGTH, small_size
from sana.utils import distributed
from sana.utils.dtype import dtype_name
from sana.utils.logging import get_logger

logger = get_logger(__name__)

DEFAULT_WORK_DIR = "output/inference"
DEBUG_PROMPTS = 2
INDEX_LIMIT = 400  # pictures on the index sheet


@dataclass(frozen=True)
class Task:
    """One picture to make."""

    item: PromptItem
    recipe: Recipe
    path: Path

    @property
    def done(self) -> bool:
        """Whether the picture is there, made by the very same recipe."""
        return self.path.is_file() and (read_recipe(self.path) or {}).get("hash") == self.recipe.hash


@dataclass
class Report:
    """What a run did.

    Attributes:
        folder: of the pictures (or the .tar they were packed in).
        index: the contact sheet; None on other processes than the main one.
        made, skipped: pictures made now, and found done.
    """

    folder: Path
    index: Path | None = None
    made: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def read_items(options: InferenceOptions) -> list[tuple[int, PromptItem, str]]:
    """Returns (index in the whole list, prompt, safe unique file name) of the part of the list to do.

    Names are given to the whole list, so that they do not depend on the part.

    Raises:
        PromptFileError: the file is missing, empty or malformed.
        ValueError: the part is empty.
    """
    file = options.json_file or options.txt_file or str(bundled(BUNDLED_PROMPTS))
    items = read_prompts(file)
    taken: set[str] = set()
    named = [(index, item, safe_name(item.prompt, taken)) for index, item in enumerate(items)]
    limit = min(options.end_index, options.sample_nums, DEBUG_PROMPTS if options.debug else len(items))
    part = named[options.start_index : limit]
    if not part:
        raise ValueError(
            f"No prompt is left between start_index {options.start_index} and {limit}: {file} has {len(items)}."
        )
    return part


def choose_device(options: InferenceOptions) -> str | None:
    """Returns the device that the options and a launcher ask for; None for the pipeline's own choice.

    Raises:
        ValueError: there is no GPU of that number.
    """
    if options.device is not None or not torch.cuda.is_available():
        if options.gpu_id is not None:
            logger.warning("gpu_id %d has no effect: there is no CUDA device", options.gpu_id)
        return options.device
    count = torch.cuda.device_count()
    index = distributed.local_rank() % count if distributed.world_size() > 1 else options.gpu_id or 0
    if not 0 <= index < count:
        raise ValueError(f"gpu_id {index} is not there: this machine has {count} CUDA devices, counted from 0.")
    return f"cuda:{index}"


def name_pipeline(options: InferenceOptions) -> tuple[SanaPipeline, str]:
    """Returns the pipeline that the options name, without weights, and where its weights are.

    Raises:
        ConfigError, FetchError, CheckpointError: config or weights are missing or broken.
    """
    weights, device = options.weights, choose_device(options)
    if options.config:
        config = loading.as_config(options.config, options.overrides)
        weights = weights or config.model.load_from
        if not weights:
            raise ValueError(f"{options.config} names no weights (model.load_from); give --model_path.")
        require_text_encoder(config.text_encoder.text_encoder_name)  # said before anything large is fetched
    else:
        assert weights is not None
        config = loading.source_config(loading.find_model(weights))
    pipeline = SanaPipeline(config, device=device, dtype=options.dtype)
    pipeline.compile(options.compile)
    return pipeline, weights


def open_pipeline(options: InferenceOptions, items: Sequence[PromptItem]) -> tuple[SanaPipeline, InferenceOptions]:
    """Returns the pipeline that the options name, with weights and settings of memory, and the options as planned.

    Args:
        options: of the run.
        items: its prompts; the largest of their pictures must fit.

    Raises:
        ConfigError, FetchError, CheckpointError: config or weights are missing or broken.
        ValueError: a size is impossible or a setting cannot take effect; nothing was loaded.
        MemoryLimitError: the pictures do not fit; nothing was loaded.
    """
    pipeline, weights = name_pipeline(options)
    sizes = [image_size(item, options, pipeline) for item in items]
    plan = plan_memory(pipeline, options, sizes)
    apply_settings(pipeline, options, plan)
    return pipeline.from_pretrained(weights), planned_options(options, plan)


def plan_tasks(
    items: Sequence[tuple[int, PromptItem, str]], options: InferenceOptions, pipeline: SanaPipeline, folder: Path
) -> list[Task]:
    """Returns one task a prompt: its size, seed, recipe, and a path that holds the recipe's hash.

    Raises:
        ValueError: a size is impossible.
    """
    tasks = []
    for index, item, name in items:
        size = image_size(item, options, pipeline)
        seed = item_seed(item, options.seed, index)
        recipe = make_recipe(pipeline, options, item, height=size.height, width=size.width, seed=seed)
        tasks.append(Task(item, recipe, folder / f"{name}_{recipe.hash[:8]}.png"))
    return tasks


def item_seed(item: PromptItem, seed: int, index: int) -> int:
    """Returns a prompt's own seed, else the run's seed plus its place in the whole list."""
    return item.seed if item.seed is not None else seed + index


def make_recipe(
    pipeline: SanaPipeline, options: InferenceOptions, item: PromptItem, *, height: int, width: int, seed: int
) -> Recipe:
    """Returns the recipe of one picture made with these options."""
    sampler = options.sampling_algo or pipeline.config.scheduler.vis_sampler
    low, high = options.interval_guidance
    return Recipe(
        prompt=item.prompt,
        negative_prompt=item.negative_prompt or "",
        seed=seed,
        height=height,
        width=width,
        num_inference_steps=options.step if options.step != -1 else DEFAULT_STEPS.get(sampler, 20),
        sampler=sampler,
        guidance_scale=float(options.cfg_scale),
        pag_scale=float(options.pag_scale),
        interval_guidance=(float(low), float(high)),
        flow_shift=float(pipeline.config.scheduler.flow_shift),
        use_resolution_binning=options.binning,
        dtype=dtype_name(pipeline.dtype),
        weights=pipeline.weights_hash(),
        step_cache=float(options.step_cache),
        max_text_tokens=options.max_text_tokens,
        upscale_from=options.upscale_from,
        upscale_strength=None if options.upscale_from is None else options.upscale_strength or DEFAULT_STRENGTH,
        quantization=scheme(options.quantization),
        text_quantization=scheme(options.text_quantization),
        compile=options.compile,
        made_with={
            "model_path": options.model_path,
            "config": options.config,
            "overrides": list(options.overrides),
            "offload": options.offload,
            "vae_tiling": options.vae_tiling,
            **environment(pipeline.device),
        },
    )


def run(options: InferenceOptions) -> list[Report]:
    """Makes every picture that is not there yet. A run that was stopped goes on where it was.

    Returns:
        One report, or one for each value of an ablation.

    Raises:
        ValueError: an option, a prompt file or a config is wrong; nothing was written.
        CheckpointError, FetchError, TextEncoderError, NonFiniteError, OSError: the work could not be done.
        MemoryLimitError: it does not fit into `max_vram`; nothing was loaded.
    """
    items = read_items(options)
    pipeline, options = open_pipeline(options, [item for _, item, _ in items])
    if options.ablation_key is None or options.ablation_selections is None:
        return [_run_folder(options, pipeline, items, _folder(options))]
    reports = []
    for value in options.ablation_selections:
        varied = options.with_value(options.ablation_key, value)
        folder = _folder(options) / f"{options.ablation_key}_{value:g}"
        reports.append(_run_folder(varied, pipeline, items, folder))
    return reports


def _run_folder(
    options: InferenceOptions, pipeline: SanaPipeline, items: Sequence[tuple[int, PromptItem, str]], folder: Path
) -> Report:
    tasks = plan_tasks(items, options, pipeline, folder)
    report = Report(folder)
    mine = distributed.share(tasks)
    report.skipped = [task.path for task in mine if task.done]
    waiting = [task for task in mine if task.path not in report.skipped]
    for batch in _batches(waiting, options.bs):
        for task, image in zip(batch, generate(pipeline, options, batch), strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            save_png(image, task.path, task.recipe.as_dict())
            report.made.append(task.path)
            logger.info("made %s", task.path)
    _wait_for_all()
    if distributed.is_main_process():
        report.index = write_index(tasks, folder)
        _finish(options, report)
    return report


def generate(pipeline: SanaPipeline, options: InferenceOptions, batch: Sequence[Task]) -> list[Image.Image]:
    """Returns the pictures of tasks of one size, from one call of the pipeline."""
    recipes = [task.recipe for task in batch]
    negatives = [recipe.negative_prompt for recipe in recipes]
    request = options.request(
        [recipe.prompt for recipe in recipes],
        height=recipes[0].height,
        width=recipes[0].width,
        negative_prompt=negatives if any(negatives) else None,
        seed=[recipe.seed for recipe in recipes],
        output_type="pil",
    )
    return pipeline.generate(request)


def write_index(tasks: Sequence[Task], folder: Path) -> Path:
    """Writes `index.png`, a sheet of all pictures of the run (the first 400) with their prompts."""
    shown = tasks[:INDEX_LIMIT]
    if len(shown) < len(tasks):
        logger.info("index.png shows the first %d of %d pictures", len(shown), len(tasks))
    sheet = contact_sheet([task.path for task in shown], [task.recipe.prompt for task in shown])
    save_png(sheet, folder / "index.png", {})
    return folder / "index.png"


def _finish(options: InferenceOptions, report: Report) -> None:
    """Writes the folder's name, and packs the folder, where that is asked for."""
    if options.if_save_dirname:
        (report.folder.parent / "dirname.txt").write_text(f"{report.folder.name}\n", encoding="utf-8")
    if not options.tar_and_del:
        return
    archive = report.folder.with_name(f"{report.folder.name}.tar")
    partial = archive.with_name(f".{archive.name}.tmp")
    pictures = sorted(report.folder.glob("*.png"))
    with tarfile.open(partial, "w") as tar:
        for picture in pictures:
            tar.add(picture, arcname=f"{report.folder.name}/{picture.name}")
    partial.replace(archive)
    for picture in pictures:
        picture.unlink()
    if not any(report.folder.iterdir()):
        report.folder.rmdir()
    report.folder, report.index = archive, None


def _folder(options: InferenceOptions) -> Path:
    """Returns the folder of the pictures: the work_dir, and below it the words that other options add to the name."""
    root = Path(options.work_dir or DEFAULT_WORK_DIR)
    dataset = options.dataset if options.dataset != "custom" else ""
    words = [word for word in (options.exist_time_prefix, dataset, options.add_label) if word]
    if not options.work_dir:
        words.append(safe_name(Path(options.model_path or options.config or options.weights or "model").stem, set()))
    return root / safe_name("_".join(words), set()) if words else root


def image_size(item: PromptItem, options: InferenceOptions, pipeline: SanaPipeline) -> inputs.ImageSize:
    """Returns the size of a picture, and the one that the model makes; the pipeline needs no weights.

    Raises:
        ValueError: it is impossible.
    """
    trained, custom = pipeline.config.model.image_size, options.custom_image_size
    height, width = item.size(trained if custom is None else custom)
    factor = pipeline.config.vae.vae_downsample_rate
    size = inputs.plan_size(height, width, factor=factor, image_size=trained, binning=options.binning)
    if options.upscale_from is not None:
        small_size(size.model_height, size.model_width, options.upscale_from, factor)
    return size


def _batches(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Gives tasks of equal picture size together, at most `size` at a time, in the order of the list."""
    groups: dict[tuple[int, int], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.recipe.height, task.recipe.width), []).append(task)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _wait_for_all() -> None:
    """Waits until every process of a launch has done its part."""
    if distributed.world_size() == 1:
        return
    import datetime

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    distributed.barrier()
