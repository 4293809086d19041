"""The loss of a variance-preserving model that predicts noise and its own variance (IDDPM). No flow matching here.

Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", section 3.1: the noise is learned by its
squared error, the variance by the variational bound alone. The process is that of `noise_schedule.VPSchedule`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sana.diffusion.flow import expand_like

HALF_BIN = 1 / 255  # of an 8-bit value in [-1, 1]
LITTLE_NOISE = 249  # the last index of 1000 at which `snr_loss` compares latents


@dataclass(frozen=True)
class VPLoss:
    """One value a sample, each (B,): `loss` = `mse` + `bound` (of one step, in bits per value)."""

    loss: Tensor
    mse: Tensor
    bound: Tensor


class VPProcess:
    """The discrete process q(x_t | x_0) and its posterior q(x_{t-1} | x_t, x_0) (DDPM, equations 4, 6 and 7).

    Args:
        betas: (T,) variances added by each step; the "linear" schedule (1e-4 to 0.02 in 1000 steps) when None.
    """

    def __init__(self, betas: Tensor | None = None) -> None:
        self.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64) if betas is None else betas.double()
        kept = (1 - self.betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        self.alphas, self.sigmas = kept.sqrt(), (1 - kept).sqrt()
        variance = self.betas * (1 - before) / (1 - kept)
        variance[0] = variance[1]  # 0 has no logarithm
        self.posterior_log_variance = variance.log()
        self.posterior_of_latents = self.betas * before.sqrt() / (1 - kept)
        self.posterior_of_noisy = (1 - before) * (1 - self.betas).sqrt() / (1 - kept)

    def add_noise(self, latents: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Returns alpha * latents + sigma * noise; latents (B, ...), index (B,) int64 in [0, T)."""
        return self._at(self.alphas, index, latents) * latents + self._at(self.sigmas, index, latents) * noise

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, index: Tensor, *, snr_loss: bool = False
    ) -> VPLoss:
        """Returns the hybrid loss.

        Args:
            prediction: (B, 2C, ...): the noise, then where the log variance lies between its two bounds (-1 to 1).
            latents: (B, C, ...).
            noise: like `latents`, as given to `add_noise`.
            index: (B,) int64 in [0, T).
            snr_loss: of samples with little noise (index up to 249, of 1000) the latents that follow from the
                predicted noise are compared, not the noise: the error is weighed with the inverse of the
                signal-to-noise ratio (`train.snr_loss` of the official code).
        """
        if prediction.shape[1] != 2 * latents.shape[1]:
            raise ValueError(
                f"prediction has {prediction.shape[1]} channels; {2 * latents.shape[1]} are needed: noise and variance."
            )
        predicted, position = prediction.chunk(2, dim=1)
        difference = noise - predicted
        if snr_loss:  # latents = (noisy - sigma * noise) / alpha
            sigma_to_alpha = self._at(self.sigmas / self.alphas, index, latents)
            little = expand_like(index <= LITTLE_NOISE, latents).bool()
            difference = torch.where(little, sigma_to_alpha * difference, difference)
        mse = difference.square().flatten(1).mean(1)
        bound = self._bound(predicted.detach(), position, latents, self.add_noise(latents, noise, index), index)
        return VPLoss(mse + bound, mse, bound)

    def _bound(self, predicted: Tensor, position: Tensor, latents: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """One term of the variational bound, (B,): a divergence of Gaussians; at index 0 the decoder's likelihood."""
        alpha, sigma = self._at(self.alphas, index, latents), self._at(self.sigmas, index, latents)
        least, greatest = (
            self._at(bounds, index, latents) for bounds in (self.posterior_log_variance, self.betas.log())
        )
        fraction = (position + 1) / 2
        log_variance = fraction * greatest + (1 - fraction) * least
        of_latents = self._at(self.posterior_of_latents, index, latents)
        of_noisy = self._at(self.posterior_of_noisy, index, latents)
        mean = of_latents * (noisy - sigma * predicted) / alpha + of_noisy * noisy
        true_mean = of_latents * latents + of_noisy * noisy
        divergence = 0.5 * (
            log_variance - least - 1 + (least - log_variance).exp() + (true_mean - mean).square() / log_variance.exp()
        )
        surprise = -discretised_log_likelihood(latents, mean, 0.5 * log_variance)
        per_value = torch.where(expand_like(index == 0, latents).bool(), surprise, divergence)
        return per_value.flatten(1).mean(1) / math.log(2)

    @staticmethod
    def _at(table: Tensor, index: Tensor, latents: Tensor) -> Tensor:
        return expand_like(table.to(index.device)[index], latents)


def discretised_log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 8-bit bin that holds a value in [-1, 1], under a Gaussian; the outer bins are open.

    Args:
        values, mean, log_scale: of one shape; log_scale is the logarithm of the standard deviation.
    """
    precision = torch.exp(-log_scale)
    above = _normal_cdf(precision * (values - mean + HALF_BIN))
    below = _normal_cdf(precision * (values - mean - HALF_BIN))
    inner = torch.where(values > 0.999, 1 - below, above - below)
    return torch.where(values < -0.999, above, inner).clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that DDPM's code uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
