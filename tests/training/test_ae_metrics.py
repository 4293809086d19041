"""PSNR, SSIM and the Fréchet distance against closed forms and against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg, signal

from sana.models.autoencoder.base import Autoencoder
from sana.pipelines.denoise import NonFiniteError
from sana.training.ae_metrics import (
    FeatureStatistics,
    evaluate_autoencoder,
    frechet_distance,
    peak_signal_to_noise,
    structural_similarity,
)


class Shift(Autoencoder):
    """Decodes what it encoded plus a constant."""

    scaling_factor, latent_channels, downsample_factor = 2.0, 3, 1

    def __init__(self, by):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(float(by)))

    def raw_encode(self, images, generator=None):
        return images

    def raw_decode(self, latents):
        return latents + self.by


def statistics(features):
    gathered = FeatureStatistics()
    for part in torch.as_tensor(features).split(7):
        gathered.add(part)
    return gathered


def test_psnr_of_a_constant_error_is_that_of_its_size():
    images = torch.zeros(2, 3, 16, 16)
    others = torch.stack([images[0] + 0.2, images[1] - 0.02])
    expected = [20 * math.log10(2 / 0.2), 20 * math.log10(2 / 0.02)]
    assert peak_signal_to_noise(images, others).tolist() == pytest.approx(expected, abs=1e-4)
    assert peak_signal_to_noise(images, images).isinf().all()


def test_ssim_of_constant_images_is_its_luminance_term():
    a, b, c1 = 0.3, 0.7, 0.01**2
    images, others = torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert structural_similarity(images, others, data_range=1.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("data_range", [2.0, 255.0])
def test_ssim_is_the_formula_written_out_with_scipy(data_range):
    rng = np.random.default_rng(0)
    x = rng.uniform(-data_range / 2, data_range / 2, (1, 2, 19, 14))
    y = 0.7 * x + rng.normal(0, 0.1 * data_range, x.shape)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2, []
    for a, b in zip(x[0], y[0]):

        def mean(image):
            return signal.correlate2d(image, window, mode="valid")

        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        values.append(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())
    ours = structural_similarity(torch.from_numpy(x), torch.from_numpy(y), data_range).item()
    assert ours == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_is_one_for_equal_images_symmetric_and_refuses_tiny_ones():
    x, y = torch.rand(2, 2, 3, 20, 20) * 2 - 1
    assert structural_similarity(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-9)
    assert torch.allclose(structural_similarity(x, y), structural_similarity(y, x))
    with pytest.raises(ValueError, match="11 x 11"):
        structural_similarity(x[..., :10], y[..., :10])


def test_statistics_are_numpys_also_far_from_zero():
    features = np.random.default_rng(0).normal(1e4, 1.0, (50, 4))
    gathered = statistics(features)
    assert np.allclose(gathered.mean.numpy(), features.mean(0))
    assert np.allclose(gathered.covariance.numpy(), np.cov(features.T), rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics(features[:1]).covariance


def whitened(count, size, seed):
    """Vectors whose sample mean is 0 and covariance is the unit matrix."""
    features = np.random.default_rng(seed).normal(size=(count, size))
    features -= features.mean(0)
    return features @ np.linalg.inv(np.linalg.cholesky(np.cov(features.T))).T


def test_frechet_distance_of_gaussians_with_diagonal_covariances():
    base, other = whitened(40, 3, 0), whitened(30, 3, 1)
    first, second = np.array([1.0, 2.0, 0.5]), np.array([0.5, 2.0, 3.0])
    shift = np.array([1.0, -2.0, 0.25])
    expected = (shift**2).sum() + ((first - second) ** 2).sum()  # of standard deviations
    ours = frechet_distance(statistics(base * first), statistics(other * second + shift))
    assert ours == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_scipys_for_any_covariances_also_singular_ones():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + 1
    product = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * product.real)
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-8)
    few = rng.normal(size=(3, 5))  # rank 2
    assert frechet_distance(statistics(few), statistics(few)) == pytest.approx(0, abs=1e-6)


def test_evaluating_a_constant_shift():
    images = torch.rand(5, 3, 16, 16) * 0.5 - 0.25
    batches = [(["a", "b"], images[:2]), (["c", "d", "e"], images[2:])]
    scores = evaluate_autoencoder(Shift(51 / 255 * 2).eval(), batches, lambda x: x.mean((2, 3)))
    assert [row["key"] for row in scores.rows] == list("abcde")
    assert scores.psnr == pytest.approx(-20 * math.log10(51 / 255), abs=1e-3)
    assert scores.latent_std == pytest.approx(2 * images.double().std(correction=0).item(), rel=1e-6)
    assert scores.rfid == pytest.approx(3 * 0.4**2, rel=1e-2)  # rounding to 8 bits moves it a little
    expected = structural_similarity(images, images + 0.4).mean().item()
    assert scores.ssim == pytest.approx(expected, abs=1e-6)


def test_a_perfect_autoencoder_and_none_at_all():
    images = torch.rand(2, 3, 16, 16)
    scores = evaluate_autoencoder(Shift(0).eval(), [(["a", "b"], images)])
    assert math.isinf(scores.psnr) and scores.ssim == pytest.approx(1) and scores.rfid is None
    with pytest.raises(ValueError, match="no image"):
        evaluate_autoencoder(Shift(0).eval(), [])
    with pytest.raises(NonFiniteError, match="a, b"):
        evaluate_autoencoder(Shift(math.nan).eval(), [(["a", "b"], images)])
