"""Whole pipelines, ours and diffusers', with the same weights: the bundled model, or random ones. Nothing is timed."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.config import SanaConfig, load_config
from sana.models.autoencoder.dc_ae import DCAE_PRESETS, DCAEConfig
from sana.models.diffusers_config import scheduler_config
from sana.models.pipeline_folder import ExportOptions, export_pipeline
from sana.models.text_encoder.chi import CHI_PROMPT
from sana.models.text_encoder.gemma import Gemma2TextEncoder
from sana.models.text_encoder.tiny import random_gemma2, train_tokenizer
from sana.models.weights import load_state_dict, read_metadata
from sana.pipelines.sana_pipeline import SanaPipeline
from tools.bench.networks import (
    STEPS,
    diffusers_autoencoder,
    diffusers_transformer,
    random_autoencoder,
    random_transformer,
    require_diffusers,
    transformer_arguments,
)

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "asset/models/sana_tiny"
GUIDANCE = 4.5
GEMMA = {"hidden_size": 2304, "vocab_size": 256_000}
CHI_TOKENS = 302  # the released tokenizer makes about so many of the instruction: prompts are padded to 600
VOCABULARY = 600  # with which ours makes as many of the instruction
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
NOUNS = ("apple", "cat", "dog", "house", "boat", "star", "tree", "bird", "fish", "flower", "car", "moon")


def prompts() -> Iterator[str]:
    """Prompts of which none comes twice, so that no cache knows them; all of about one length."""
    for number in itertools.count():
        for noun, other, colour, ground in itertools.product(NOUNS, NOUNS, COLOURS, COLOURS):
            again = f"{number} " if number else ""
            yield f"a {colour} {noun} to the left of {again}a {other} on a {ground} background"


@dataclass(frozen=True)
class Shape:
    """Everything that decides the three networks; the defaults are the official ones.

    Attributes:
        model: "0.6B" or "1.6B".
        pixels: image size.
        transformer: constructor arguments that differ.
        autoencoder: shape of the DC-AE.
        gemma: fields of `Gemma2Config` that differ from the 2B model's.
    """

    model: str = "0.6B"
    pixels: int = 1024
    transformer: dict[str, Any] = field(default_factory=dict)
    autoencoder: DCAEConfig = DCAE_PRESETS["dc-ae-f32c32-sana-1.1"]
    gemma: dict[str, Any] = field(default_factory=lambda: dict(GEMMA))


@dataclass(frozen=True)
class Noise:
    """Draws what both pipelines start from: (B, channels, side, side)."""

    channels: int
    side: int
    device: torch.device

    def __call__(self, batch: int, seed: int) -> Tensor:
        """The same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, self.channels, self.side, self.side, generator=generator).to(self.device)


class OurSide:
    """Our pipeline, called as a user calls it.

    Args:
        pipeline: with its three networks.
        pixels: image size.
        steps: of sampling.
    """

    def __init__(self, pipeline: SanaPipeline, pixels: int, steps: int = STEPS) -> None:
        self.pipeline, self.pixels, self.steps = pipeline, pixels, steps
        autoencoder = pipeline.autoencoder
        self.noise = Noise(autoencoder.latent_channels, pixels // autoencoder.downsample_factor, pipeline.device)
        self._prompts = prompts()

    def __call__(self, batch: int = 1, seed: int = 0) -> Tensor:
        """Pictures (B, 3, H, W) of prompts that were never seen."""
        return self.make([next(self._prompts) for _ in range(batch)], seed)

    def make(self, texts: Sequence[str], seed: int = 0, output: str = "pt") -> Tensor:
        """Pictures in [-1, 1], or latents, of the given prompts."""
        images = self.pipeline(
            prompt=list(texts), height=self.pixels, width=self.pixels, num_inference_steps=self.steps,
            guidance_scale=GUIDANCE, latents=self.noise(len(texts), seed), use_resolution_binning=False,
            output_type=output, progress_bar=False,
        )  # fmt: skip
        return images if output == "latent" else images.clamp(-1, 1)


class DiffusersSide:
    """diffusers' pipeline on the same prompts and noise.

    Args:
        pipeline: a `diffusers.SanaPipeline`.
        ours: whose noise and settings it takes.
    """

    def __init__(self, pipeline: Any, ours: OurSide) -> None:
        self.pipeline, self.pixels, self.steps, self.noise = pipeline, ours.pixels, ours.steps, ours.noise
        pipeline.set_progress_bar_config(disable=True)
        self._prompts = prompts()
        text = ours.pipeline.config.text_encoder
        self.text_options = {
            "complex_human_instruction": list(text.chi_prompt or []) or None,
            "max_sequence_length": text.model_max_length,
        }

    def __call__(self, batch: int = 1, seed: int = 0) -> Tensor:
        """See `OurSide`."""
        return self.make([next(self._prompts) for _ in range(batch)], seed)

    @torch.inference_mode()
    def make(self, texts: Sequence[str], seed: int = 0, output: str = "pt") -> Tensor:
        """See `OurSide`. The null caption gets the prompt's mask, which Sana was trained with; the work is the same."""
        embeds, mask, null, _ = self.pipeline.encode_prompt(list(texts), negative_prompt="", **self.text_options)
        images = self.pipeline(
            negative_prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask, negative_prompt_embeds=null,
            negative_prompt_attention_mask=mask, height=self.pixels, width=self.pixels,
            num_inference_steps=self.steps, guidance_scale=GUIDANCE, latents=self.noise(len(texts), seed),
            use_resolution_binning=False, output_type=output,
        ).images  # fmt: skip
        return images if output == "latent" else images * 2 - 1


@dataclass
class Pair:
    """Both sides."""

    ours: OurSide
    theirs: DiffusersSide


@functools.lru_cache(maxsize=1)
def bundled_pair(folder: Path) -> Pair:
    """The bundled model in float32 on the CPU, for diffusers exported below `folder`."""
    return Pair(ours := bundled_ours(), bundled_theirs(folder, ours))


def bundled_ours() -> OurSide:
    """Our pipeline with the bundled model, float32 on the CPU."""
    pipeline = SanaPipeline.from_pretrained(BUNDLED, device="cpu", dtype="fp32")
    return OurSide(pipeline, pipeline.config.model.image_size)


def bundled_theirs(folder: Path, ours: OurSide) -> DiffusersSide:
    """diffusers' pipeline with the bundled model, exported below `folder` unless it is there."""
    require_diffusers()
    import diffusers

    target = export_bundled(folder)
    return DiffusersSide(diffusers.SanaPipeline.from_pretrained(target, torch_dtype=torch.float32), ours)


def export_bundled(folder: Path) -> Path:
    """Writes the bundled model in the layout of diffusers; returns its folder."""
    target = folder / "bundled_diffusers"
    if not (target / "model_index.json").is_file():
        metadata = read_metadata(BUNDLED)
        assert metadata is not None
        parts = {"vae": str(BUNDLED / "vae"), "text_encoder": str(BUNDLED / "text_encoder")}
        export_pipeline(target, load_state_dict(BUNDLED), metadata, ExportOptions(full=True, dtype="fp32", **parts))
    return target


def random_config(shape: Shape) -> SanaConfig:
    """The official configuration of the model, with what `shape` changes."""
    name = {"0.6B": "Sana_600M_img1024", "1.6B": "Sana_1600M_img1024"}[shape.model]
    config = load_config(ROOT / f"configs/sana_config/1024ms/{name}.yaml")
    config.model.image_size = shape.pixels
    config.model.fp32_attention = False
    config.text_encoder.chi_prompt = list(CHI_PROMPT)
    return config


def random_ours(shape: Shape, device: str, dtype: torch.dtype, steps: int = STEPS) -> OurSide:
    """Our pipeline with random weights and a random text encoder of Gemma-2-2b's shape."""
    pipeline = SanaPipeline(random_config(shape), device=device, dtype=dtype)
    arguments = transformer_arguments(shape.model, shape.pixels) | shape.transformer
    pipeline.transformer = random_transformer(arguments, device, dtype)
    pipeline.autoencoder = random_autoencoder(shape.autoencoder, device, dtype)
    torch.manual_seed(0)
    with torch.device(device):  # eager attention: the only kind that caps the logits, in both pipelines
        model, _ = random_gemma2(**{**GEMMA, "attn_implementation": "eager", **shape.gemma})
    model = model.to(device, dtype).eval().requires_grad_(False)
    text = pipeline.config.text_encoder
    pipeline.text_encoder = Gemma2TextEncoder(
        model, random_tokenizer(), model_max_length=text.model_max_length, chi_prompt=text.chi_prompt, name="random"
    )
    return OurSide(pipeline, shape.pixels, steps)


@functools.cache
def random_tokenizer() -> Any:
    """A tokenizer that cuts the instruction into about as many tokens as the released one."""
    text = [line for line in CHI_PROMPT for _ in range(2)]
    return train_tokenizer([*text, *itertools.islice(prompts(), 200)], VOCABULARY)


def random_theirs(ours: OurSide) -> DiffusersSide:
    """diffusers' pipeline with copies of the weights of ours, in the same dtypes."""
    require_diffusers()
    import copy

    import diffusers

    pipeline: Any = ours.pipeline
    scheduler = scheduler_config("flow-dpm_solver", pipeline.config.scheduler.flow_shift)
    return DiffusersSide(
        diffusers.SanaPipeline(
            tokenizer=copy.deepcopy(pipeline.text_encoder.tokenizer),
            text_encoder=copy.deepcopy(pipeline.text_encoder.model),
            vae=diffusers_autoencoder(pipeline.autoencoder),
            transformer=diffusers_transformer(pipeline.transformer),
            scheduler=diffusers.DPMSolverMultistepScheduler.from_config(scheduler),
        ),
        ours,
    )
