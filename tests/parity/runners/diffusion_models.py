"""The analytic models of the recorded sampling cases, and how a case states its options. No case is run here."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.parity.common import Case

# Options that the description of a case states in words when its call leaves them out.
IN_WORDS = {
    "order": r"\border=(\d)",
    "steps": r"\bsteps=(\d+)",
    "flow_shift": r"\bshift=(\d+(?:\.\d+)?)",
    "cfg_scale": r"\bcfg=(\d+(?:\.\d+)?)",
}


def setting(case: Case, name: str, pattern: str, default: Any) -> Any:
    """Returns an option from the case's call, else from the words of its description, else the default."""
    if name in case.call:
        return case.call[name]
    match = re.search(pattern, case.raw.get("made_by", ""))
    return match[1] if match else default


def settings(case: Case, **defaults: Any) -> Iterator[dict[str, Any]]:
    """Yields the options of every run of a case: run over call over description over `defaults`."""
    common = dict(defaults)
    for name, pattern in IN_WORDS.items():
        if name in case.call or (match := re.search(pattern, case.raw.get("made_by", ""))):
            value = case.call.get(name) or match[1]
            common[name] = int(value) if name in ("order", "steps") else float(value)
    common |= {name: value for name, value in case.call.items() if name != "runs"}
    for run in case.call.get("runs") or [{}]:
        yield {**common, **run}


class GaussianMixture:
    """Exact velocity of a mixture of Gaussians that the caption shifts, computed in float64 (formula in `made_by`)."""

    def __init__(self, case: Case) -> None:
        parameters = case.tensors("gm.")
        self.means, self.variances, self.log_weights = (parameters[name].double() for name in ("mu", "var", "logw"))

    def __call__(self, latents: Tensor, timestep: Tensor, caption: Tensor | None) -> Tensor:
        sigma = float(timestep) / 1000
        alpha = 1 - sigma
        rows = latents.double().flatten(1)  # (B, D)
        shift = 0 if caption is None else caption.double().flatten(1).mean(1)[:, None, None]  # (B, 1, 1)
        offset = rows[:, None] - alpha * (self.means + shift)  # (B, K, D)
        variances = alpha**2 * self.variances + sigma**2  # (K,)
        logits = self.log_weights - 0.5 * offset.square().sum(-1) / variances - 0.5 * rows.shape[1] * variances.log()
        parts = self.means + shift + (alpha * self.variances / variances)[:, None] * offset
        data = (logits.softmax(-1)[..., None] * parts).sum(1)
        return ((rows - data) / max(sigma, 1e-12)).reshape(latents.shape).float()


class TinyNoiseModel:
    """The noise predictor of the VP cases: 0.7 tanh(x) + 0.0003 t x / (1 + |x|) + 0.1 c."""

    def __call__(self, latents: Tensor, timestep: Tensor, caption: Tensor | None) -> Tensor:
        noise = 0.7 * torch.tanh(latents) + 0.0003 * timestep * latents / (1 + latents.abs())
        return noise if caption is None else noise + 0.1 * caption


def trigflow_model(latents: Tensor, angle: Tensor) -> Tensor:
    """The network of the SCM cases: 0.5 sin(2x) + 0.3 cos(t) x."""
    return 0.5 * torch.sin(2 * latents) + 0.3 * torch.cos(angle) * latents


def with_captions(model: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> Callable[..., dict[str, Tensor]]:
    """Returns the model as the denoiser that `guide` takes: branches of the case's captions."""
    captions = {"cond": case.tensor("in.cond"), "uncond": case.tensor("in.uncond")}

    def denoiser(latents: Tensor, sigma: Tensor, branches: tuple[str, ...]) -> dict[str, Tensor]:
        return {branch: model(latents, sigma * 1000, captions[branch]) for branch in branches}

    return denoiser
