"""How good an autoencoder is: PSNR, SSIM and the Fréchet distance of features, each from its formula.

Feature extractors are in `inception.py`; the command is `tools/ae_eval.py`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.models.autoencoder.base import Autoencoder
from sana.pipelines.denoise import NonFiniteError

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as in its paper


def peak_signal_to_noise(images: Tensor, others: Tensor, data_range: float = 2.0) -> Tensor:
    """PSNR of each image in dB: 10 log10(range^2 / mean squared error); infinite for equal images.

    Args:
        images: (B, C, H, W).
        others: same shape.
        data_range: largest minus smallest possible value.

    Returns:
        (B,) float64.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def structural_similarity(images: Tensor, others: Tensor, data_range: float = 2.0) -> Tensor:
    """SSIM of each image (Wang et al. 2004, eq. 13): Gaussian window 11 x 11 with sigma 1.5, K1 0.01, K2 0.03.

    Windows lie wholly inside the image; the index is averaged over positions and then over channels.

    Args:
        images: (B, C, H, W), H and W at least 11.
        others: same shape.
        data_range: largest minus smallest possible value.

    Returns:
        (B,) float64 in [-1, 1].

    Raises:
        ValueError: the images are smaller than the window.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, not {tuple(images.shape[-2:])}")
    x, y = images.double(), others.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).flatten(1).mean(1)


def _blur(images: Tensor) -> Tensor:
    """Gaussian mean of each 11 x 11 window; rows first, then columns."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1])


class FeatureStatistics:
    """Mean and unbiased covariance of feature vectors, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._products = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: (B, D)."""
        rows = features.detach().double().cpu()
        if not self.count:
            self._origin = rows.mean(0)  # sums around it lose fewer digits than around 0
        rows = rows - self._origin
        self.count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._products = self._products + rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self._origin + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D).

        Raises:
            ValueError: fewer than two vectors were given.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, and {self.count} was given")
        return (self._products - torch.outer(self._sum, self._sum) / self.count) / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), as of two Gaussians (Heusel et al. 2017, eq. 6).

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ second.covariance @ root)
    trace = first.covariance.trace() + second.covariance.trace() - 2 * middle.clamp(min=0).sqrt().sum()
    return ((first.mean - second.mean).square().sum() + trace).item()


@dataclass
class AutoencoderScores:
    """What `evaluate_autoencoder` measured.

    Attributes:
        rows: key, psnr (dB) and ssim of every image.
        psnr, ssim: their means over images.
        latent_std: standard deviation of the scaled latents; about 1 for an autoencoder whose scaling factor fits.
        rfid: Fréchet distance between the features of images and decoded images; None without an extractor.
    """

    rows: list[dict[str, float | str]] = field(default_factory=list)
    psnr: float = math.nan
    ssim: float = math.nan
    latent_std: float = math.nan
    rfid: float | None = None


@torch.no_grad()
def evaluate_autoencoder(
    autoencoder: Autoencoder,
    batches: Iterable[tuple[list[str], Tensor]],
    extractor: Callable[[Tensor], Tensor] | None = None,
) -> AutoencoderScores:
    """Encodes and decodes images, and compares what came out, clamped to [-1, 1], with what went in.

    Args:
        autoencoder: in eval mode.
        batches: (keys, images (B, 3, H, W) in [-1, 1]); every batch may have its own size.
        extractor: images in [-1, 1] -> (B, D) features, for rFID; it sees decoded images rounded to 8 bits.

    Raises:
        ValueError: no image, or one image and an extractor.
        NonFiniteError: a decoded image is not finite.
    """
    scores, device = AutoencoderScores(), next(autoencoder.parameters()).device
    real, fake = FeatureStatistics(), FeatureStatistics()
    count, total, squares = 0, 0.0, 0.0
    for keys, images in batches:
        images = images.to(device)
        latents = autoencoder.encode(images)
        decoded = autoencoder.decode(latents).float()
        if not decoded.isfinite().all():
            raise NonFiniteError(f"the autoencoder gives NaN or infinity in the batch {', '.join(keys)}; try fp32")
        decoded = decoded.clamp(-1, 1)
        pairs = zip(keys, peak_signal_to_noise(images, decoded), structural_similarity(images, decoded), strict=True)
        scores.rows += [{"key": key, "psnr": psnr.item(), "ssim": ssim.item()} for key, psnr, ssim in pairs]
        wide = latents.double()
        count, total, squares = count + wide.numel(), total + wide.sum().item(), squares + wide.square().sum().item()
        if extractor is not None:
            real.add(extractor(images))
            fake.add(extractor(((decoded + 1) * 127.5).round() / 127.5 - 1))
    if not scores.rows:
        raise ValueError("there is no image to evaluate")
    for name in ("psnr", "ssim"):
        setattr(scores, name, sum(float(row[name]) for row in scores.rows) / len(scores.rows))
    scores.latent_std = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
    scores.rfid = None if extractor is None else frechet_distance(real, fake)
    return scores
