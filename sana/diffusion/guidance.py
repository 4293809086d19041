"""Guidance: which branches of the model a step needs and how their predictions combine. No sampler is here.

CFG is Ho and Salimans 2022; the interval Kynkäänniemi et al. 2024; PAG (a branch whose self-attention is the identity
in some blocks) Ahn et al. 2024. The model evaluates the branches in the order of `BRANCHES`, in one batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sana.diffusion.flow import noise_from_velocity

BRANCHES = ("uncond", "cond", "perturbed")
KINDS = ("uncond", "classifier-free", "classifier-free_PAG", "classifier-free_PAG_seq")
PAG_SEQ_MIN_SIGMA = 0.5  # below it the sequential form leaves the perturbed branch out

Denoiser = Callable[[Tensor, Tensor, tuple[str, ...]], Mapping[str, Tensor]]
VelocityFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """How strongly, and when, a prediction is pushed towards the prompt.

    Attributes:
        kind: one of KINDS. "uncond" evaluates the model once on the prompt, without guidance (the official name).
            "classifier-free_PAG_seq" uses the perturbed branch only from sigma 0.5 up.
        guidance_scale: weight of cond - uncond; 1 leaves the uncond branch out.
        pag_scale: weight of cond - perturbed, for the PAG kinds.
        interval: sigmas (lower, upper), both exclusive, between which CFG works; outside, the prompt alone. An upper
            end of 1 or more includes sigma 1. The PAG kinds ignore it, as the official sampler does.

    Raises:
        ValueError: unknown kind, a scale that is not finite, or an interval that is empty.
    """

    kind: str = "classifier-free"
    guidance_scale: float = 4.5
    pag_scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Unknown guidance kind {self.kind!r}; known kinds: {', '.join(KINDS)}.")
        for name in ("guidance_scale", "pag_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}.")
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise ValueError(f"The guidance interval must be two rising numbers in [0, 1], not {self.interval}.")

    def branches(self, sigma: float | Tensor) -> tuple[str, ...]:
        """Returns the branches that a step at noise level `sigma` needs, in the order of the stacked batch."""
        if self.kind == "uncond":
            return ("cond",)
        guided: tuple[str, ...] = ("cond",) if self.guidance_scale == 1.0 else ("uncond", "cond")
        if self.kind == "classifier-free":
            return guided if self._inside(sigma) else ("cond",)
        perturb = self.kind == "classifier-free_PAG" or float(sigma) >= PAG_SEQ_MIN_SIGMA
        return (*guided, "perturbed") if perturb else guided

    def combine(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Returns uncond + guidance_scale * (cond - uncond) + pag_scale * (cond - perturbed) of the branches present.

        Args:
            outputs: branch -> prediction (B, ...): velocity or noise, which guidance treats alike.
        """
        cond = outputs["cond"]
        guided = cond
        if "uncond" in outputs:
            guided = outputs["uncond"] + self.guidance_scale * (cond - outputs["uncond"])
        if "perturbed" in outputs:
            guided = guided + self.pag_scale * (cond - outputs["perturbed"])
        return guided

    def _inside(self, sigma: float | Tensor) -> bool:
        level = torch.as_tensor(sigma, dtype=torch.float32)  # ends are compared in float32, as grids are made
        lower, upper = self.interval
        return bool(level > lower) and (upper >= 1 or bool(level < upper))


def select_guidance_kind(default: str, pag_scale: float, attn_type: str) -> str:
    """Returns the kind a pipeline uses: PAG when its scale exceeds 1 and the attention is linear, else plain CFG.

    Args:
        default: the config's kind. It decides nothing, as in the official pipeline: the scale alone does.
        pag_scale: 1 means no PAG here.
        attn_type: the transformer's self-attention; only "linear" can be perturbed.

    Raises:
        ValueError: `default` is no kind.
    """
    if default not in KINDS:
        raise ValueError(f"Unknown guidance kind {default!r}; known kinds: {', '.join(KINDS)}.")
    return "classifier-free_PAG" if pag_scale > 1.0 and attn_type == "linear" else "classifier-free"


def guide(denoiser: Denoiser, guidance: Guidance) -> VelocityFn:
    """Returns the guided prediction as a function of (latents, sigma), one call of `denoiser` each.

    Args:
        denoiser: (latents (B, ...), sigma 0-d, branches) -> branch -> prediction (B, ...).
        guidance: how the branches combine.
    """

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return guidance.combine(denoiser(latents, sigma, guidance.branches(sigma)))

    return velocity


def noise_branches(denoiser: Denoiser) -> Denoiser:
    """Returns `denoiser` with every velocity turned into the noise it implies, so that guidance works on noise.

    Guiding noise or velocity is the same up to rounding; the official sampler guides noise.
    """

    def noise(latents: Tensor, sigma: Tensor, branches: tuple[str, ...]) -> dict[str, Tensor]:
        outputs = denoiser(latents, sigma, branches)
        level = sigma.to(latents.device)
        return {branch: noise_from_velocity(latents, output, level) for branch, output in outputs.items()}

    return noise
