"""What somebody asks the page for, checked: every refusal is one sentence for the page. Nothing is drawn here."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.options import DemoOptions
from app.presets import STEP, Presets
from app.styles import NO_STYLE, Style
from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import select_guidance_kind
from sana.ops.backend import plain_kind
from sana.pipelines.sana_pipeline import DEFAULT_STEPS, SanaPipeline

MAX_PROMPT = 4000  # characters; the server's limit
MAX_SEED = 2**53 - 1  # JavaScript's whole numbers end here
DRAWN_SEEDS = 2**32
MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_PAG = 10.0


class WishError(ValueError):
    """Something cannot be asked for; the message is one sentence for the page and holds nothing of the server."""


@dataclass(frozen=True)
class Limits:
    """What one model can be asked for, and what the page starts with.

    Attributes:
        presets: the sizes.
        max_images: pictures of one wish.
        max_steps, steps: the most, and those that the page starts with.
        max_guidance, guidance: the same of classifier-free guidance; 1 is off.
        max_pag, pag: the same of perturbed-attention guidance; both are 1 where the model cannot do it.
        negative: whether a negative prompt has an effect.
        styles: by name.
    """

    presets: Presets
    max_images: int
    max_steps: int
    steps: int
    max_guidance: float
    guidance: float
    max_pag: float
    pag: float
    negative: bool
    styles: Mapping[str, Style] = field(default_factory=dict)

    @classmethod
    def of(cls, pipeline: SanaPipeline, options: DemoOptions, styles: Mapping[str, Style]) -> "Limits":
        """Returns the limits of a loaded pipeline."""
        config = pipeline.config
        sampler = config.scheduler.vis_sampler
        steps = options.step if options.step != -1 else DEFAULT_STEPS[sampler]
        negative = SAMPLERS[sampler].prediction != "trigflow"
        pag = _can_perturb(pipeline) and negative
        return cls(
            presets=Presets(config.model.image_size, config.vae.vae_downsample_rate, options.image_size),
            max_images=options.max_images,
            max_steps=max(MAX_STEPS, steps),
            steps=steps,
            max_guidance=max(MAX_GUIDANCE, options.cfg_scale),
            guidance=options.cfg_scale,
            max_pag=max(MAX_PAG, options.pag_scale) if pag else 1.0,
            pag=options.pag_scale if pag else 1.0,
            negative=negative,
            styles=styles,
        )


@dataclass(frozen=True)
class Wish:
    """What one press of the button asks for.

    Attributes:
        prompt, negative_prompt: as they were typed.
        style: put around them.
        width, height: in pixels.
        steps, guidance, pag: of the sampling.
        seed: of the first picture; picture i uses seed + i.
        number: of pictures.
    """

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    pag: float
    seed: int
    number: int = 1
    negative_prompt: str = ""
    style: Style = field(default_factory=lambda: Style(NO_STYLE))

    @property
    def full_prompt(self) -> str:
        """The prompt as it is drawn, with the style's words."""
        return self.style.apply(self.prompt, self.negative_prompt)[0]

    @property
    def full_negative_prompt(self) -> str:
        """The negative prompt as it is used, with the style's words."""
        return self.style.apply(self.prompt, self.negative_prompt)[1]


def read_wish(fields: Mapping[str, Any], limits: Limits) -> Wish:
    """Returns the wish of the page's fields; draws a seed where `randomise` is true.

    Args:
        fields: prompt, negative_prompt, style, width, height, steps, guidance, pag, seed, randomise and number, with
            whatever a browser may send.
        limits: of the model.

    Raises:
        WishError: a field is wrong.
    """
    prompt = _text("The prompt", fields["prompt"])
    if not prompt.strip():
        raise WishError("The prompt is empty; write what the picture shall show.")
    negative = _text("The negative prompt", fields["negative_prompt"] or "")
    style = limits.styles.get(fields["style"] or NO_STYLE) if isinstance(fields["style"] or "", str) else None
    if style is None:
        raise WishError("There is no such style; choose one of those that are shown.")
    if not limits.negative:
        if negative.strip():
            raise WishError("This model cannot use a negative prompt; leave it empty.")
        style = Style(style.name, style.prompt)
    number = _whole("The number of pictures", fields["number"], 1, limits.max_images)
    randomise = bool(fields["randomise"])
    seed = secrets.randbelow(DRAWN_SEEDS) if randomise else _whole("The seed", fields["seed"], 0, MAX_SEED - number + 1)
    wish = Wish(
        prompt=prompt.strip(),
        negative_prompt=negative.strip(),
        style=style,
        width=_side("The width", fields["width"], limits.presets),
        height=_side("The height", fields["height"], limits.presets),
        steps=_whole("Steps", fields["steps"], 1, limits.max_steps),
        guidance=_number("Guidance", fields["guidance"], limits.max_guidance),
        pag=_number("PAG", fields["pag"], limits.max_pag),
        seed=seed,
        number=number,
    )
    if max(len(wish.full_prompt), len(wish.full_negative_prompt)) > MAX_PROMPT:
        raise WishError(f"The prompt is too long with its style; at most {MAX_PROMPT} characters are taken.")
    return wish


def _can_perturb(pipeline: SanaPipeline) -> bool:
    """Returns whether the model can do perturbed-attention guidance."""
    model = pipeline.config.model
    kind = select_guidance_kind(model.guidance_type, 2.0, plain_kind(model.attn_type)[0])
    depth = len(getattr(pipeline.transformer, "blocks", ())) or max(model.pag_applied_layers, default=0) + 1
    layers = model.pag_applied_layers
    return kind == "classifier-free_PAG" and bool(layers) and all(0 <= layer < depth for layer in layers)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise WishError(f"{name} must be a text.")
    if len(value) > MAX_PROMPT:
        raise WishError(f"{name} has {len(value)} characters; at most {MAX_PROMPT} are taken.")
    return value


def _finite(value: object) -> float | None:
    """Returns the number that a browser sent, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**63 or not math.isfinite(value):
        return None
    return value


def _whole(name: str, value: object, low: int, high: int) -> int:
    number = _finite(value)
    if number is None or number != int(number) or not low <= number <= high:
        raise WishError(f"{name} must be a whole number from {low} to {high}.")
    return int(number)


def _number(name: str, value: object, high: float) -> float:
    number = _finite(value)
    if number is None or not 1 <= number <= high:
        raise WishError(f"{name} must be a number from 1 (off) to {high:g}.")
    return float(number)


def _side(name: str, value: object, presets: Presets) -> int:
    side = _whole(name, value, presets.smallest, presets.greatest)
    if side % STEP:
        low, high = side // STEP * STEP, (side // STEP + 1) * STEP
        raise WishError(f"{name} must be a multiple of {STEP} pixels; {low} and {high} are.")
    return side
