"""The IDDPM loss against recorded numbers, closed forms of the process, and probabilities that sum to one."""

import math

import pytest
import torch

from sana.diffusion.noise_schedule import VPSchedule
from sana.diffusion.vp_loss import VPProcess, discretised_log_likelihood
from tests.parity.common import Case, load_cases

CASES = [case for case in load_cases() if case.kind == "training_loss" and "out.vb" in case.tensors("")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_recorded_numbers(case: Case) -> None:
    recorded = case.tensors("in.")
    prediction = recorded["model_out"].clone().requires_grad_()
    result = VPProcess().loss(prediction, recorded["x0"], recorded["noise"], recorded["t_index"])
    for ours, name in ((result.loss, "loss"), (result.mse, "mse"), (result.bound, "vb")):
        case.assert_close(ours, case.tensor(f"out.{name}"), name)
    result.loss.mean().backward()
    case.assert_close(prediction.grad, case.tensor("grad.model_out"), "gradient")


def test_the_process_is_that_of_the_noise_schedule() -> None:
    process, schedule = VPProcess(), VPSchedule()
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(process.alphas, schedule.alpha(times))
    torch.testing.assert_close(process.sigmas, schedule.sigma(times))
    latents, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    noisy = process.add_noise(latents, noise, torch.tensor([0, 999]))
    torch.testing.assert_close(noisy[1], process.alphas[999] * latents[1] + process.sigmas[999] * noise[1])


def test_the_perfect_prediction_costs_nothing_and_variance_alone_is_learned_by_the_bound() -> None:
    latents, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    index = torch.tensor([10, 700])
    perfect = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # -1: the posterior's own variance
    result = VPProcess().loss(perfect, latents, noise, index)
    torch.testing.assert_close(result.loss, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    prediction = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    VPProcess().loss(prediction, latents, noise, index).bound.sum().backward()
    assert bool((prediction.grad[:, :3] == 0).all())
    assert bool((prediction.grad[:, 3:] != 0).all())


def test_bins_of_an_8_bit_value_have_probabilities_that_sum_to_one() -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in ((0.1, 0.3), (0.9, 0.5)):
        probability = discretised_log_likelihood(values, torch.tensor(mean), torch.tensor(math.log(scale))).exp()
        assert float(probability.sum()) == pytest.approx(1, abs=1e-9)
        assert float(probability[128]) == pytest.approx(  # the density times the width of a bin
            math.exp(-0.5 * ((float(values[128]) - mean) / scale) ** 2) / scale / math.sqrt(2 * math.pi) * 2 / 255,
            rel=0.02,
        )


def test_index_zero_uses_the_likelihood_of_the_data() -> None:
    latents = torch.zeros(1, 1, 2, 2)
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    process, index = VPProcess(), torch.zeros(1, dtype=torch.int64)
    widest = torch.ones_like(noise)  # the variance is then the first beta, 1e-4
    good, bad = (process.loss(torch.cat([noise + error, widest], 1), latents, noise, index) for error in (0, 3))
    # 3 sigma_0 / alpha_0 is 0.03, and the bin of the value 0 reaches from -1/255 to 1/255
    likelihood = [
        torch.distributions.Normal(mean, 0.01).cdf(torch.tensor([-1 / 255, 1 / 255])).diff() for mean in (0.0, 0.03)
    ]
    assert float(bad.bound - good.bound) == pytest.approx(float((likelihood[0] / likelihood[1]).log2()), rel=0.03)


def test_snr_loss_compares_latents_where_there_is_little_noise() -> None:
    process, generator = VPProcess(), torch.Generator().manual_seed(4)
    index = torch.tensor([0, 100, 249, 250, 999])
    latents, noise, predicted = (torch.randn(5, 4, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    position = torch.zeros_like(latents)
    plain, weighed = (
        process.loss(torch.cat([predicted, position], 1), latents, noise, index, snr_loss=snr) for snr in (False, True)
    )
    alpha, sigma = (table[index].view(-1, 1, 1, 1) for table in (process.alphas, process.sigmas))
    expected = (alpha * latents + sigma * noise - sigma * predicted) / alpha  # the latents that the prediction means
    of_latents = (latents - expected).square().flatten(1).mean(1)
    assert torch.allclose(weighed.mse[:3], of_latents[:3], rtol=1e-9) and torch.equal(weighed.mse[3:], plain.mse[3:])
    assert torch.equal(weighed.bound, plain.bound) and torch.equal(weighed.loss, weighed.mse + weighed.bound)


def test_a_prediction_without_a_variance_is_an_error() -> None:
    latents = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="4 channels; 8 are needed"):
        VPProcess().loss(latents, latents, latents, torch.zeros(1, dtype=torch.int64))
