"""Timestep densities against recorded draws, recorded quantiles and closed-form distributions."""

import pytest
import torch

from sana.diffusion.timestep_sampling import sample_density, sample_timesteps
from tests.parity.common import load_cases

CASES = {case.name: case for case in load_cases() if case.kind == "timestep_sampling"}
RUNS = [(case, run) for case in CASES.values() for run in case.call.get("runs", [])]


@pytest.mark.parametrize(
    ("case", "run"), RUNS, ids=lambda value: value.get("key", "") if isinstance(value, dict) else ""
)
def test_draws_are_the_recorded_ones(case, run) -> None:
    options = {name: run[name] for name in ("logit_mean", "logit_std", "mode_scale") if name in run}
    torch.manual_seed(run["seed_u64"])
    drawn = sample_density(run["scheme"], 64, **options)
    case.assert_close(drawn, case.tensor(f"out.u64.{run['key']}"), run["key"])
    torch.manual_seed(run["seed_1e6"])
    many = sample_density(run["scheme"], 1_000_000, **options).double()
    assert float(many.mean()) == pytest.approx(run["mean"], abs=1e-6)
    assert float(many.std()) == pytest.approx(run["std"], abs=1e-5)


def test_the_training_loop_draws_a_uniform_index_first() -> None:
    case = next(
        (case for case in CASES.values() if "out.randint" in case.tensors("") or not case.call.get("runs")), None
    )
    if case is None:
        pytest.skip("this folder of cases records no training loop")
    recorded = case.tensors("out.")
    for scheme, expected in (("uniform", recorded["randint"]), ("logit_normal", recorded["logit_normal"])):
        generator = torch.Generator().manual_seed(5080)
        assert torch.equal(sample_timesteps(scheme, len(expected), generator=generator), expected), scheme


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
def test_every_scheme_takes_effect_and_stays_in_range(scheme: str) -> None:
    index = sample_timesteps(scheme, 20_000, generator=torch.Generator().manual_seed(1)).double()
    assert index.min() >= 0
    assert index.max() <= 999
    middle = float(((index >= 250) & (index < 750)).double().mean())
    # P(1/4 < sigmoid(n) < 3/4) = P(|n| < log 3); "mode" with scale 1.29 favours the middle too
    expected = {"uniform": 0.5, "logit_normal": 0.728, "mode": 0.74}[scheme]
    assert middle == pytest.approx(expected, abs=0.03)


def test_logit_normal_follows_its_distribution_function() -> None:
    drawn = sample_density("logit_normal", 200_000, logit_mean=0.4, logit_std=0.8).double()
    normal = torch.distributions.Normal(0.4, 0.8)
    for level in (0.2, 0.5, 0.8):
        expected = float(normal.cdf(torch.logit(torch.tensor(level))))
        assert float((drawn < level).double().mean()) == pytest.approx(expected, abs=0.005)


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match=r"'cosmap'.*logit_normal"):
        sample_timesteps("cosmap", 4)
    with pytest.raises(ValueError, match="angles"):
        sample_timesteps("logit_normal_trigflow", 4)
