"""Pictures of the validation prompts while a model is trained, through `SanaPipeline` with noise that stays the same.

When to validate, and with which weights (the averaged ones), the trainer decides.
"""

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sana.config import SanaConfig
from sana.diffusion import SAMPLERS
from sana.models.text_encoder.base import PromptEmbeds
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.images import contact_sheet, save_png, to_pil
from sana.pipelines.request import Request
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.utils import distributed
from sana.utils.dtype import parse_dtype
from sana.utils.logging import get_logger
from sana.utils.seed import MAX_SEED

logger = get_logger(__name__)

GUIDANCE_SCALE = 4.5
CELLS = (192, 512)  # smallest and largest side of a picture on the sheet, in pixels
# The pipeline's inference mode would leave tensors behind that a sharded model cannot train with; no_grad does not.
_GENERATE = inspect.unwrap(SanaPipeline.generate)


class Validator:
    """Draws the same prompts from the same noise again and again.

    A run leaves no trace in the training: gradients, random numbers, train and eval modes and `requires_grad` stay.

    Args:
        pipeline: holds the live networks, see `live_pipeline`.
        prompts: at least one; they are encoded once, after which the text encoder may be freed.
        folder: of the sheets, usually `work_dir/validation`; it is made.
        every: steps between two validations; 0 for none.
        height, width: of the pictures, in pixels.
        seed: picture i starts from the noise of seed + i.
        num_inference_steps: None for the sampler's usual number.
        guidance_scale: 1 is off.
        deterministic: False takes other noise at every step (a function of seed and step).
        batch_size: pictures a call of the pipeline.
        cache_prompts: False encodes the prompts anew every time, for a text encoder that is trained too.
        autocast: the precision that the transformer is run in; None for its own.
    """

    def __init__(
        self,
        pipeline: SanaPipeline,
        prompts: Sequence[str],
        folder: str | Path,
        *,
        every: int,
        height: int,
        width: int,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        deterministic: bool = True,
        batch_size: int = 4,
        cache_prompts: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not prompts or batch_size < 1 or every < 0:
            raise ValueError(
                f"Validation needs prompts, a positive batch_size and every >= 0; it got {len(prompts)} prompts, "
                f"{batch_size} and {every}."
            )
        self.pipeline, self.prompts, self.folder = pipeline, list(prompts), Path(folder)
        self.every, self.seed, self.deterministic = every, seed, deterministic
        self.batch_size, self.cache_prompts, self.autocast = batch_size, cache_prompts, autocast
        self._options: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "progress_bar": False,
        }
        self._embeds: tuple[PromptEmbeds, PromptEmbeds | None] | None = None

    @classmethod
    def for_training(
        cls, config: SanaConfig, *, transformer: nn.Module, autoencoder: Any, text_encoder: Any, folder: str | Path
    ) -> Self:
        """Returns the validator that a configuration asks for, around live networks.

        Args:
            config: `train.validation_prompts`, `eval_sampling_steps`, `deterministic_validation`, `seed`,
                `model.image_size` and `mixed_precision` are read.
            transformer, autoencoder, text_encoder: what is trained and what belongs to it. None: loaded when needed.
            folder: of the sheets.
        """
        pipeline = live_pipeline(config, transformer=transformer, autoencoder=autoencoder, text_encoder=text_encoder)
        dtype = parse_dtype(config.model.mixed_precision)
        mixed = pipeline.device.type == "cuda" and dtype != pipeline.dtype
        return cls(
            pipeline,
            config.train.validation_prompts,
            folder,
            every=config.train.eval_sampling_steps,
            height=config.model.image_size,
            width=config.model.image_size,
            seed=config.train.seed,
            deterministic=config.train.deterministic_validation,
            cache_prompts=not (config.train.extra or {}).get("train_text_encoder", False),
            autocast=dtype if mixed else None,
        )

    def due(self, step: int) -> bool:
        """Whether a validation belongs after this many steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def prepare(self) -> None:
        """Encodes the prompts now, so that a prompt that cannot be encoded fails at the start of a run.

        Raises:
            TextEncoderError: the text encoder cannot be had.
            NonFiniteError: it produced values that are not finite.
        """
        if self.cache_prompts and self._embeds is None:
            with _undisturbed(self._networks()), torch.no_grad():
                self._embeds = self._encode()

    def run(self, step: int) -> Path | None:
        """Draws all prompts and writes `step_00000400.png`. A sharded model needs this call on every process.

        Args:
            step: optimiser steps done.

        Returns:
            The sheet; None on other processes than the main one, or if it could not be written (which is logged).
        """
        with _undisturbed(self._networks()), torch.no_grad(), self._autocast():
            pictures = self._pictures(step)
        if not distributed.is_main_process():
            return None
        path = self.folder / f"step_{step:08d}.png"
        height, width = self._options["height"], self._options["width"]
        shown = [one if one is not None else _placeholder(height, width) for one in pictures]
        sheet = contact_sheet(shown, self.prompts, cell=min(max(height, width, CELLS[0]), CELLS[1]))
        recipe = {"step": step, "seeds": self.seeds(step), "prompts": self.prompts, **self._options}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_png(sheet, path, recipe)
        except OSError as error:
            logger.error("the validation sheet %s could not be written: %s", path, error)
            return None
        return path

    def seeds(self, step: int) -> list[int]:
        """Returns the seed of every picture's noise."""
        first = self.seed if self.deterministic else self.seed + step * len(self.prompts)
        return [(first + index) % MAX_SEED for index in range(len(self.prompts))]

    def _pictures(self, step: int) -> list[Image.Image | None]:
        """Returns one picture a prompt, None where a value was not finite."""
        try:
            embeds = self._embeds or self._encode()
        except NonFiniteError as error:
            logger.error("validation at step %d: %s", step, error)
            return [None] * len(self.prompts)
        if self.cache_prompts:
            self._embeds = embeds
        pictures: list[Image.Image | None] = []
        rows = list(range(len(self.prompts)))
        for start in range(0, len(rows), self.batch_size):
            pictures += self._draw(rows[start : start + self.batch_size], step, embeds)
        return pictures

    def _draw(
        self, rows: Sequence[int], step: int, embeds: tuple[PromptEmbeds, PromptEmbeds | None]
    ) -> list[Image.Image | None]:
        """Draws some prompts in one call; where that fails, one by one, so that only the bad pictures are missing."""
        prompt, null = embeds
        seeds = self.seeds(step)
        request = Request(
            prompt_embeds=prompt.embeds[list(rows)],
            prompt_attention_mask=prompt.mask[list(rows)],
            negative_prompt_embeds=null.embeds if null is not None else None,
            seed=[seeds[row] for row in rows],
            **self._options,
        )
        try:
            images: Tensor = _GENERATE(self.pipeline, request)
        except NonFiniteError as error:
            if len(rows) > 1:
                return [picture for row in rows for picture in self._draw([row], step, embeds)]
            logger.error("validation at step %d, %r: %s", step, self.prompts[rows[0]], error)
            return [None]
        return list(to_pil(images))

    def _encode(self) -> tuple[PromptEmbeds, PromptEmbeds | None]:
        """Returns the embeddings of the prompts, and of the null caption where guidance needs it."""
        prompt = self.pipeline.encode_prompts(self.prompts)
        sampler = SAMPLERS[self.pipeline.config.scheduler.vis_sampler]
        guided = self._options["guidance_scale"] != 1.0 and sampler.prediction != "trigflow"
        return prompt, self.pipeline.encode_prompts([""], null=True) if guided else None

    def _networks(self) -> list[nn.Module]:
        # the pipeline's own attributes: its properties would load what is not there yet
        pipeline = self.pipeline
        networks = (pipeline.transformer, pipeline._autoencoder, pipeline._text_encoder)
        return [one for one in networks if isinstance(one, nn.Module)]

    def _autocast(self) -> torch.autocast:
        # without the cache: a cast made here must not serve a training step of other weights
        device = self.pipeline.device.type
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)


def live_pipeline(
    config: SanaConfig, *, transformer: nn.Module, autoencoder: Any = None, text_encoder: Any = None
) -> SanaPipeline:
    """Returns a pipeline around networks that are being trained; nothing is copied, cast or moved.

    Args:
        config: of the run.
        transformer: unwrapped (no DDP); its parameters' device and dtype become the pipeline's.
        autoencoder, text_encoder: None loads those of the config when they are first used.
    """
    parameter = next(transformer.parameters())
    pipeline = SanaPipeline(config, device=parameter.device, dtype=parameter.dtype)
    pipeline.transformer = transformer
    if autoencoder is not None:
        pipeline.autoencoder = autoencoder
    if text_encoder is not None:
        pipeline.text_encoder = text_encoder
    return pipeline


@contextmanager
def _undisturbed(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Networks are in eval mode inside; modes, `requires_grad` and all random numbers are as before afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    learns = [(parameter, parameter.requires_grad) for network in networks for parameter in network.parameters()]
    devices = sorted({parameter.device.index or 0 for parameter, _ in learns if parameter.device.type == "cuda"})
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        for network in networks:
            network.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, required in learns:
                parameter.requires_grad_(required)
            random.setstate(python)
            np.random.set_state(array)


def _placeholder(height: int, width: int) -> Image.Image:
    """Returns what stands on the sheet where a picture is not finite: a grey field with a cross."""
    picture = Image.new("RGB", (width, height), (96, 96, 96))
    draw = ImageDraw.Draw(picture)
    stroke = max(1, min(height, width) // 64)
    draw.line((0, 0, width, height), fill=(224, 64, 64), width=stroke)
    draw.line((0, height, width, 0), fill=(224, 64, 64), width=stroke)
    return picture
