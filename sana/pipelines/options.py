"""The options of a list of pictures, with their official names and checks. Nothing is read or made here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana.models.quantization.schemes import SCHEMES
from sana.pipelines import inputs
from sana.pipelines.compiled import MODES
from sana.pipelines.plan_request import MIN_TILE, NONE, OFFLOADS, parse_memory
from sana.pipelines.request import Request
from sana.registry import suggest

BUNDLED_MODEL = "asset/models/sana_tiny"
BUNDLED_PROMPTS = "asset/samples_mini.txt"
ABLATION_KEYS = ("cfg_scale", "pag_scale", "step", "seed")
CHOICES = {
    "compile": MODES,
    "offload": OFFLOADS,
    "quantization": (NONE, *SCHEMES),
    "text_quantization": (NONE, *SCHEMES),
}


def bundled(relative: str) -> Path:
    """Returns a file or folder of the repository: below the current folder, else beside the package."""
    here = Path(relative)
    return here if here.exists() else Path(__file__).parents[2] / relative


def check_choice(name: str, value: str | None, known: Sequence[str]) -> None:
    """Raises ValueError, naming the nearest, unless `value` is None or one of the known ones."""
    if value is not None and value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.{suggest(str(value), list(known))}")


@dataclass(frozen=True)
class InferenceOptions:
    """The options of `scripts/inference.py`, with the official names.

    Attributes:
        config: YAML file; None where the weights carry their own config.
        model_path: weights; None for the bundled model, or with a config its `model.load_from`.
        txt_file, json_file: the prompts; the bundled list when both are None.
        work_dir: folder of the pictures.
        sample_nums: use only so many prompts of the list.
        bs: pictures in one call of the transformer.
        cfg_scale, pag_scale, interval_guidance: guidance.
        sampling_algo: sampler; None for the config's.
        seed: prompt i of the whole list uses seed + i, unless its line says its own.
        dataset, add_label, exist_time_prefix: words for the name of the folder.
        step: sampling steps; -1 for the sampler's default.
        tar_and_del: pack the folder into a .tar beside it and delete it.
        custom_image_size: side of square pictures; None for the model's size.
        start_index, end_index: the part of the list to do.
        ablation_key, ablation_selections: repeat everything for each value of one option.
        debug: only the first two prompts.
        if_save_dirname: write the folder's name to `<work_dir>/dirname.txt`.
        dtype, device: of the pipeline; None for its defaults.
        gpu_id: number of the GPU instead of `device`; under a launcher each process takes its own.
        overrides: `--section.key=value` arguments for the config.
        use_resolution_binning, step_cache, max_text_tokens, upscale_from, upscale_strength: see `Request`.
        compile: mode of `SanaPipeline.compile`.
        max_vram: what may be allocated on the device, such as "8GB": settings of memory are planned before weights are
            loaded. The next four, where given, are kept by the plan.
        quantization, text_quantization: scheme of the transformer's and the text encoder's weights, or "none".
        offload: "none", "model", "group" or "sequential".
        vae_tiling: True for the autoencoder's own tiles, or their side in pixels; False for none.
    """

    config: str | None = None
    model_path: str | None = None
    txt_file: str | None = None
    json_file: str | None = None
    work_dir: str | None = None
    sample_nums: int = 100_000
    bs: int = 1
    cfg_scale: float = 4.5
    pag_scale: float = 1.0
    interval_guidance: Sequence[float] = (0.0, 1.0)
    sampling_algo: str | None = None
    seed: int = 0
    dataset: str = "custom"
    add_label: str = ""
    exist_time_prefix: str = ""
    step: int = -1
    tar_and_del: bool = False
    custom_image_size: int | None = None
    start_index: int = 0
    end_index: int = 30_000
    ablation_key: str | None = None
    ablation_selections: Sequence[float] | None = None
    debug: bool = False
    if_save_dirname: bool = False
    dtype: str | None = None
    device: str | None = None
    gpu_id: int | None = None
    overrides: Sequence[str] = ()
    use_resolution_binning: bool = True
    step_cache: float = 0.0
    max_text_tokens: int | None = None
    upscale_from: int | None = None
    upscale_strength: float | None = None
    compile: str = "off"
    max_vram: str | None = None
    quantization: str | None = None
    text_quantization: str | None = None
    offload: str | None = None
    vae_tiling: bool | int | None = None

    def __post_init__(self) -> None:
        inputs.check_count("bs", self.bs, 10_000)
        inputs.check_count("sample_nums", self.sample_nums, 10**9)
        if self.step != -1:
            inputs.check_count("step", self.step, inputs.MAX_STEPS)
        if not 0 <= self.start_index < self.end_index:
            raise ValueError(f"start_index {self.start_index} must be at least 0 and below end_index {self.end_index}.")
        if (self.ablation_key is None) != (self.ablation_selections is None):
            raise ValueError("ablation_key and ablation_selections belong together; one of them is missing.")
        if self.ablation_key is not None and self.ablation_key not in ABLATION_KEYS:
            raise ValueError(f"ablation_key must be one of {', '.join(ABLATION_KEYS)}, not {self.ablation_key!r}.")
        if self.device is not None and self.gpu_id is not None:
            raise ValueError("device and gpu_id were both given; give one of them.")
        if self.txt_file and self.json_file:
            raise ValueError("txt_file and json_file were both given; give one of them.")
        if self.overrides and not self.config:
            raise ValueError(f"{self.overrides[0]} changes a config; it needs --config.")
        for name, known in CHOICES.items():
            check_choice(name, getattr(self, name), known)
        self._check_memory()
        self.request(["checked"])

    def _check_memory(self) -> None:
        tile = self.vae_tiling
        if isinstance(tile, int) and not isinstance(tile, bool):
            inputs.check_number("vae_tiling", tile, MIN_TILE, inputs.MAX_SIDE)
        if self.max_vram is not None:
            parse_memory("max_vram", self.max_vram)
            if tile is True:
                raise ValueError(
                    "vae_tiling needs the side of a tile beside max_vram, or leave the choice to the plan."
                )

    def request(self, prompts: Sequence[str], **more: Any) -> Request:
        """Returns the pipeline's arguments for prompts with these options."""
        return Request(
            prompt=list(prompts),
            num_inference_steps=None if self.step == -1 else self.step,
            guidance_scale=self.cfg_scale,
            pag_scale=self.pag_scale,
            interval_guidance=tuple(self.interval_guidance),
            sampler=self.sampling_algo,
            use_resolution_binning=self.binning,
            step_cache=self.step_cache,
            max_text_tokens=self.max_text_tokens,
            upscale_from=self.upscale_from,
            upscale_strength=self.upscale_strength,
            **more,
        )

    def with_value(self, key: str, value: float) -> "InferenceOptions":
        """Returns these options with one of the ablation's keys changed.

        Raises:
            ValueError: the value is not allowed for the key.
        """
        if key in ("step", "seed") and not float(value).is_integer():
            raise ValueError(f"ablation_selections of {key} must be whole numbers, not {value:g}.")
        changed: Any = {key: int(value) if key in ("step", "seed") else float(value)}
        return replace(self, **changed)

    @property
    def binning(self) -> bool:
        """See `Request.binning`."""
        return self.use_resolution_binning and self.upscale_from is None

    @property
    def weights(self) -> str | None:
        """The weights named by the options; None where the config must name them."""
        return self.model_path or (None if self.config else str(bundled(BUNDLED_MODEL)))
