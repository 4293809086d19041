"""The arguments of one call of the pipeline, each with its meaning and range. Nothing is generated here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sana.models.text_encoder.base import PromptEmbeds
from sana.pipelines import inputs
from sana.pipelines.approximations import check_approximations, first_tokens
from sana.pipelines.text_features import trim_given
from sana.pipelines.upscale import check_upscale

OUTPUT_TYPES = ("pt", "pil", "np", "latent")
MAX_SCALE = 1000.0
SECOND_ANGLE = 1.3  # of two Sprint steps, as the released models take them


class Encode(Protocol):
    """What turns prompts into embeddings: `SanaPipeline.encode_prompts`."""

    def __call__(self, prompts: Sequence[str], *, null: bool = False, trim: bool = False) -> PromptEmbeds: ...


@dataclass(frozen=True)
class Request:
    """One call. B = number of prompts x num_images_per_prompt; the images of a prompt stand together.

    Attributes:
        prompt: a text or a list; None when `prompt_embeds` are given.
        height, width: in pixels; None for the model's own size.
        negative_prompt: what to guide away from; one for all, or one for each prompt.
        num_inference_steps: calls of the transformer (a sampler of higher order reuses earlier ones).
        guidance_scale: 1 is off.
        pag_guidance_scale: perturbed-attention guidance; 0 and 1 are off. `pag_scale` is its other name.
        pag_scale: see `pag_guidance_scale`.
        interval_guidance: guidance acts where low < sigma < high only.
        step_cache: approximation, 0 is off: steps reuse the last prediction while the time embedding has changed by
            less than this (relative L1, added up); see `sana.diffusion.step_cache`. About 0.1 to 0.3.
        max_text_tokens: approximation, None is off: the transformer reads the first so many readable tokens of each
            prompt; see `sana.pipelines.approximations.first_tokens`.
        upscale_from: side in pixels of a square of whose area a small picture of the same shape is made first; the
            large one starts from it. Above the size the model was trained at this keeps objects whole; see
            `sana.pipelines.upscale`. Samplers of the flow only.
        upscale_strength: noise level in (0, 1) at which the large picture starts; the nearest of the schedule is
            taken, and the steps before it are left out. Less keeps more of the small picture. None for the default.
        num_images_per_prompt: pictures of each prompt.
        generator: one for the whole batch, or a list with one for each image.
        seed: image i uses seed + i; a list gives each image its own. Not together with `generator`.
        latents: (B, C, h, w) noise to start from instead of drawn noise; of standard deviation 1, or
            `scheduler.sigma_data` for a Sprint model, as the released pipelines take them.
        prompt_embeds: (P, L, D) embeddings instead of prompts, with `prompt_attention_mask` (P, L).
        negative_prompt_embeds: (P, L, D) or (1, L, D); needs no mask of its own: the prompt's serves both.
        negative_prompt_attention_mask: accepted beside them, without effect for that reason.
        use_resolution_binning: generate the nearest shape the model was trained for, then resize and crop. Not with
            `upscale_from`, which makes the very size that is asked for.
        sampler: a name of `sana.diffusion.SAMPLERS`; None for the config's.
        flow_shift: None for the config's.
        max_timesteps, intermediate_timesteps, timesteps: of Sprint models only: the first angle; the second of exactly
            two steps (None for even steps); or all of them and 0 (`num_inference_steps` is then their number).
        output_type: "pt", "pil", "np" or "latent".
        callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": latents})` after every step; a
            returned dict with "latents" replaces them.
        progress_bar: show one (on a terminal).
    """

    prompt: str | Sequence[str] | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 4.5
    pag_guidance_scale: float | None = None
    pag_scale: float | None = None
    interval_guidance: Sequence[float] = (0.0, 1.0)
    step_cache: float = 0.0
    max_text_tokens: int | None = None
    upscale_from: int | None = None
    upscale_strength: float | None = None
    num_images_per_prompt: int = 1
    generator: inputs.Generators = None
    seed: int | Sequence[int] | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    use_resolution_binning: bool = True
    sampler: str | None = None
    flow_shift: float | None = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | None = SECOND_ANGLE
    timesteps: Sequence[float] | None = None
    output_type: str = "pt"
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError("Give prompt or prompt_embeds, one of the two.")
        if (self.prompt_embeds is None) != (self.prompt_attention_mask is None):
            raise ValueError("prompt_embeds and prompt_attention_mask belong together; one of them is missing.")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("negative_prompt and negative_prompt_embeds were both given; give one of them.")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {self.output_type!r}.")
        if self.num_inference_steps is not None:
            inputs.check_count("num_inference_steps", self.num_inference_steps, inputs.MAX_STEPS)
        inputs.check_count("num_images_per_prompt", self.num_images_per_prompt, 10_000)
        inputs.check_number("guidance_scale", self.guidance_scale, 0.0, MAX_SCALE)
        if self.flow_shift is not None:
            inputs.check_number("flow_shift", self.flow_shift, 1e-3, 1e3)
        check_approximations(self.step_cache, self.max_text_tokens)
        check_upscale(self.upscale_from, self.upscale_strength, self.latents)
        self._check_pag()
        self._check_interval()
        self._check_embeds()

    def _check_pag(self) -> None:
        given = {float(scale) for scale in (self.pag_guidance_scale, self.pag_scale) if scale is not None}
        for scale in given:
            inputs.check_number("pag_guidance_scale", scale, 0.0, MAX_SCALE)
            if 0.0 < scale < 1.0:
                raise ValueError(f"pag_guidance_scale {scale:g} has no effect; use more than 1, or 1 to switch it off.")
        if len(given) > 1:
            raise ValueError("pag_guidance_scale and pag_scale are two names of one option and were given two values.")

    def _check_interval(self) -> None:
        if len(self.interval_guidance) != 2:
            raise ValueError(f"interval_guidance must be two numbers in [0, 1], not {self.interval_guidance!r}.")
        low, high = (inputs.check_number("interval_guidance", one, 0.0, 1.0) for one in self.interval_guidance)
        if low > high:
            raise ValueError(f"interval_guidance must not begin above its end, and {low:g} is more than {high:g}.")

    def _check_embeds(self) -> None:
        if self.prompt_embeds is None or self.prompt_attention_mask is None:
            inputs.as_negative_prompts(self.negative_prompt, self.prompt_count)
            return
        embeds, mask = _rows(self.prompt_embeds), _rows(self.prompt_attention_mask, 2)
        if tuple(mask.shape) != tuple(embeds.shape[:2]):
            raise ValueError(
                f"prompt_attention_mask must have the shape {tuple(embeds.shape[:2])} of prompt_embeds, "
                f"not {tuple(mask.shape)}."
            )
        if self.negative_prompt_embeds is not None:
            negative = _rows(self.negative_prompt_embeds)
            if negative.shape[1:] != embeds.shape[1:] or negative.shape[0] not in (1, embeds.shape[0]):
                raise ValueError(
                    f"negative_prompt_embeds must have the shape {tuple(embeds.shape)} of prompt_embeds, "
                    f"not {tuple(negative.shape)}."
                )

    def check_for_sprint(self) -> None:
        """Rejects what a distilled model cannot use.

        Raises:
            ValueError: a negative prompt, PAG, an interval or a step cache is given.
        """
        if self.negative_prompt or self.negative_prompt_embeds is not None:
            raise ValueError("A Sprint model has no unconditional branch: negative_prompt cannot take effect.")
        if self.pag > 1.0 or tuple(self.interval_guidance) != (0.0, 1.0) or self.flow_shift is not None:
            raise ValueError("PAG, interval_guidance and flow_shift cannot take effect with a Sprint model.")
        if self.step_cache:
            raise ValueError("step_cache cannot take effect with a Sprint model, whose few steps are all needed.")

    def check_for_flow(self) -> None:
        """Rejects what only a distilled model can use.

        Raises:
            ValueError: one of the Sprint times is given.
        """
        if self.max_timesteps is not None or self.timesteps is not None or self.intermediate_timesteps != SECOND_ANGLE:
            raise ValueError(
                "max_timesteps, intermediate_timesteps and timesteps act in Sprint models, and this is none."
            )

    def sprint_times(self) -> dict[str, Any]:
        """Returns the options of a Sprint sampler's times."""
        first = {} if self.max_timesteps is None else {"max_timesteps": self.max_timesteps}
        return {**first, "intermediate_timesteps": self.intermediate_timesteps}

    def angles(self) -> Tensor | None:
        """Returns the Sprint angles that the caller listed, 0 at the end, or None.

        Raises:
            ValueError: they do not fall from at most pi/2 to 0.
        """
        if self.timesteps is None:
            return None
        angles = torch.tensor([float(one) for one in self.timesteps], dtype=torch.float32)
        falls = len(angles) > 1 and bool((angles[:-1] > angles[1:]).all()) and angles[-1] == 0 and angles[0] < 1.571
        if not falls or self.max_timesteps is not None:
            raise ValueError(
                "timesteps must fall from at most pi/2 to 0, and come without max_timesteps; "
                f"they are {list(self.timesteps)}."
            )
        return angles

    @property
    def prompt_count(self) -> int:
        """Number of prompts."""
        if self.prompt_embeds is not None:
            return int(self.prompt_embeds.shape[0])
        assert self.prompt is not None
        return len(inputs.as_prompts(self.prompt))

    @property
    def binning(self) -> bool:
        """Whether a trained shape is generated and then resized and cropped, where there is a table of them."""
        return self.use_resolution_binning and self.upscale_from is None

    @property
    def pag(self) -> float:
        """The scale of perturbed-attention guidance; 1 is off."""
        given = self.pag_guidance_scale if self.pag_guidance_scale is not None else self.pag_scale
        return float(given) if given else 1.0

    def embeds(self, encode: Encode, device: torch.device) -> PromptEmbeds:
        """Returns the prompts' embeddings, one row an image, as long as the longest prompt."""
        if self.prompt_embeds is not None and self.prompt_attention_mask is not None:
            mask = _rows(self.prompt_attention_mask, 2).long()
            encoded = trim_given(PromptEmbeds(_rows(self.prompt_embeds).to(device), mask), device)
        else:
            assert self.prompt is not None
            encoded = encode(inputs.as_prompts(self.prompt), trim=True)
        return self._one_an_image(first_tokens(encoded, self.max_text_tokens))

    def null_embeds(self, encode: Encode, device: torch.device) -> PromptEmbeds:
        """Returns the null caption's or the negative prompts' embeddings, one row an image."""
        if self.negative_prompt_embeds is not None:
            embeds = _rows(self.negative_prompt_embeds).to(device)
            embeds = embeds.expand(self.prompt_count, -1, -1)
            encoded = PromptEmbeds(embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=device))
        else:
            encoded = encode(inputs.as_negative_prompts(self.negative_prompt, self.prompt_count), null=True)
        return self._one_an_image(encoded)

    def _one_an_image(self, encoded: PromptEmbeds) -> PromptEmbeds:
        count = self.num_images_per_prompt
        return replace(
            encoded, embeds=encoded.embeds.repeat_interleave(count, 0), mask=encoded.mask.repeat_interleave(count, 0)
        )


def _rows(tensor: Tensor, ndim: int = 3) -> Tensor:
    """Drops the middle axis of length one that embeddings have in some releases: (P, 1, L, D) -> (P, L, D)."""
    tensor = tensor.squeeze(1) if tensor.ndim == ndim + 1 and tensor.shape[1] == 1 else tensor
    if tensor.ndim != ndim:
        raise ValueError(f"Embeddings must have {ndim} axes, not the shape {tuple(tensor.shape)}.")
    return tensor
