"""The table of samplers: all are called alike."""

import pytest
import torch

from sana.diffusion import SAMPLERS
from sana.diffusion.sampler import Sampler
from sana.registry import UnknownNameError

NAMES = ("flow_dpm-solver", "flow_euler", "dpm-solver", "sa-solver", "scm", "trigflow")


def test_the_table_has_the_official_names() -> None:
    assert sorted(SAMPLERS) == sorted(NAMES)
    with pytest.raises(UnknownNameError, match="flow_dpm-solver"):
        SAMPLERS["flow_dpm_solver"]


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_makes_times_and_walks_them(name: str) -> None:
    sampler = SAMPLERS[name]
    assert isinstance(sampler, Sampler)
    assert sampler.prediction in ("velocity", "noise", "trigflow")
    flow_shift = {} if sampler.prediction == "trigflow" else {"flow_shift": 2.0}
    times = sampler.times(4, **flow_shift)
    assert times.shape == (5,)
    assert bool((times.diff() < 0).all())
    noise, seen = torch.randn(2, 3), []
    result = sampler.sample(
        lambda latents, time: 0.1 * latents,
        noise.clone(),
        times,
        generator=[torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)],
        callback=lambda index, time, latents: seen.append((index, time)),
    )
    assert result.shape == noise.shape
    assert torch.isfinite(result).all()
    assert seen == list(enumerate(times[:-1].tolist()))


@pytest.mark.parametrize("name", NAMES)
def test_the_given_noise_is_left_as_it_was(name: str) -> None:
    sampler, noise = SAMPLERS[name], torch.randn(2, 3)
    kept = noise.clone()
    sampler.sample(lambda latents, time: latents, noise, sampler.times(3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise, kept)
