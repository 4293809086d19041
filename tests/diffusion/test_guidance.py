"""Guidance: which branches a step asks for, and what they add up to."""

import math

import pytest
import torch
from torch import Tensor

from sana.diffusion.guidance import Guidance, guide, noise_branches, select_guidance_kind

COND, BOTH = ("cond",), ("uncond", "cond")


@pytest.mark.parametrize(
    ("guidance", "sigma", "branches"),
    [
        (Guidance("uncond", 4.5), 0.5, COND),
        (Guidance("classifier-free", 4.5), 0.5, BOTH),
        (Guidance("classifier-free", 4.5), 1.0, BOTH),
        (Guidance("classifier-free", 1.0), 0.5, COND),
        (Guidance("classifier-free", 0.0), 0.5, BOTH),
        (Guidance("classifier-free", 4.5, interval=(0.2, 0.7)), 0.9, COND),
        (Guidance("classifier-free", 4.5, interval=(0.2, 0.7)), 0.5, BOTH),
        (Guidance("classifier-free", 4.5, interval=(0.2, 0.7)), 0.2, COND),
        (Guidance("classifier-free", 4.5, interval=(0.2, 0.7)), 0.7, COND),
        (Guidance("classifier-free_PAG", 4.5, 2.0), 0.5, (*BOTH, "perturbed")),
        (Guidance("classifier-free_PAG", 4.5, 2.0, interval=(0.2, 0.3)), 0.9, (*BOTH, "perturbed")),
        (Guidance("classifier-free_PAG", 1.0, 2.0), 0.5, ("cond", "perturbed")),
        (Guidance("classifier-free_PAG_seq", 4.5, 2.0), 0.9, (*BOTH, "perturbed")),
        (Guidance("classifier-free_PAG_seq", 4.5, 2.0), 0.3, BOTH),
        (Guidance("classifier-free_PAG_seq", 1.0, 2.0), 0.3, COND),
    ],
)
def test_branches(guidance: Guidance, sigma: float, branches: tuple[str, ...]) -> None:
    assert guidance.branches(sigma) == branches
    assert guidance.branches(torch.tensor(sigma)) == branches


def test_ends_of_the_interval_are_compared_as_float32() -> None:
    """float32(0.3) exceeds 0.3, but on the official grid they are one number, and the end is exclusive."""
    assert Guidance(interval=(0.3, 0.9)).branches(float(torch.tensor(0.3))) == COND


def test_combination() -> None:
    outputs = {name: torch.randn(2, 3, dtype=torch.float64) for name in ("uncond", "cond", "perturbed")}
    uncond, cond, perturbed = outputs.values()
    expected = uncond + 4.5 * (cond - uncond) + 2 * (cond - perturbed)
    torch.testing.assert_close(Guidance("classifier-free_PAG", 4.5, 2.0).combine(outputs), expected)
    without = {name: outputs[name] for name in ("cond", "perturbed")}
    torch.testing.assert_close(
        Guidance("classifier-free_PAG", 1.0, 2.0).combine(without), cond + 2 * (cond - perturbed)
    )
    assert torch.equal(Guidance().combine({"cond": cond}), cond)


def test_guide_calls_the_model_once_and_noise_or_velocity_give_the_same() -> None:
    calls: list[tuple[str, ...]] = []

    def denoiser(latents: Tensor, sigma: Tensor, branches: tuple[str, ...]) -> dict[str, Tensor]:
        calls.append(branches)
        weights = {"uncond": 1.0, "cond": 2.0, "perturbed": -1.0}
        return {branch: torch.sin(weights[branch] * latents) for branch in branches}

    guidance = Guidance("classifier-free_PAG", 4.5, 2.0)
    latents, sigma = torch.randn(3, 4, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    velocity = guide(denoiser, guidance)(latents, sigma)
    noise = guide(noise_branches(denoiser), guidance)(latents, sigma)
    torch.testing.assert_close(noise, latents + 0.4 * velocity)
    assert calls == [("uncond", "cond", "perturbed")] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "cfg"},
        {"guidance_scale": math.nan},
        {"pag_scale": math.inf},
        {"interval": (0.8, 0.2)},
        {"interval": (0.1, math.nan)},
    ],
)
def test_impossible_guidance_is_an_error(options: dict) -> None:
    with pytest.raises(ValueError, match=r"guidance|pag_scale"):
        Guidance(**options)


@pytest.mark.parametrize(
    ("pag_scale", "attn_type", "kind"),
    [
        (1.0, "linear", "classifier-free"),
        (2.0, "linear", "classifier-free_PAG"),
        (2.0, "flash", "classifier-free"),
        (0.0, "linear", "classifier-free"),
    ],
)
def test_the_kind_follows_the_scale(pag_scale: float, attn_type: str, kind: str) -> None:
    assert select_guidance_kind("classifier-free", pag_scale, attn_type) == kind
    assert select_guidance_kind("classifier-free_PAG", pag_scale, attn_type) == kind


def test_an_unknown_default_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="'cfg'"):
        select_guidance_kind("cfg", 1.0, "linear")
