"""What an autoencoder's training minimises: pixel terms, a perceptual distance by the LPIPS formula, latent variance.

The adversarial term and its weight are in `dcae_discriminator.py`; which terms a run uses is in `dcae_trainer.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.models.checkpoint import CheckpointError, read_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths between the poolings


@dataclass(frozen=True)
class LossWeights:
    """Factor of each term; 0 leaves a term out.

    Attributes:
        l1: mean absolute error.
        mse: mean squared error.
        gradient: mean absolute error of the differences between neighbouring pixels.
        multiscale: mean absolute errors at 1/2, 1/4 and 1/8 of the size, summed.
        latent: mean^2 + log(std)^2 per latent channel, which keeps latents at unit variance.
        lpips: perceptual distance.
        gan: hinge loss against the discriminator, beside its adaptive weight.
    """

    l1: float = 1.0
    mse: float = 0.0
    gradient: float = 0.0
    multiscale: float = 0.0
    latent: float = 0.0
    lpips: float = 0.0
    gan: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"the weight of the loss term {name} is {value}: it must be a number of at least 0")
        if not any((self.l1, self.mse, self.gradient, self.multiscale, self.lpips)):
            raise ValueError("every reconstruction term has weight 0: give l1, mse, gradient, multiscale or lpips one")


LOSSES = {
    "scenes": LossWeights(mse=2.0, gradient=0.5, multiscale=0.5, latent=0.1),  # the bundled autoencoder's
    "lpips": LossWeights(lpips=0.1),  # photographs; 0.1 suits unit channel weights, see asset/docs
}


def reconstruction_terms(
    decoded: Tensor, images: Tensor, weights: LossWeights, perceptual: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Every reconstruction term with a weight, unweighted, 0-d. `mse` is always there: PSNR is read from it.

    Args:
        decoded: (B, 3, H, W) float32.
        images: same shape, in [-1, 1].
        weights: which terms.
        perceptual: (decoded, images) -> (B,) distances; needed when `weights.lpips` is not 0.
    """
    terms = {"mse": F.mse_loss(decoded, images)}
    if weights.l1:
        terms["l1"] = F.l1_loss(decoded, images)
    if weights.gradient:
        terms["gradient"] = sum(F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
    if weights.multiscale:
        terms["multiscale"] = sum(F.l1_loss(F.avg_pool2d(decoded, f), F.avg_pool2d(images, f)) for f in (2, 4, 8))
    if weights.lpips:
        assert perceptual is not None
        terms["lpips"] = perceptual(decoded, images).mean()
    return terms


def latent_term(latents: Tensor) -> Tensor:
    """mean^2 + log(std)^2, averaged over the channels of (B, C, h, w) raw latents; 0-d."""
    flat = latents.float().transpose(0, 1).flatten(1)  # (C, B h w)
    return (flat.mean(1).square() + flat.std(1).log().square()).mean()


def weighted_sum(terms: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """Sum of weight times term, over the terms that have a weight."""
    return sum(getattr(weights, name) * value for name, value in terms.items() if getattr(weights, name))


def feature_distance(first: Tensor, second: Tensor, channel_weights: Tensor | None = None) -> Tensor:
    """One layer of LPIPS (Zhang et al. 2018, eq. 1): mean over positions of sum_c w_c (x_c / |x| - y_c / |y|)^2.

    Args:
        first: (B, C, h, w) features; each position's vector is scaled to unit length.
        second: same shape.
        channel_weights: (C,) non-negative w_c; None for 1, in which case a layer's distance is in [0, 4].

    Returns:
        (B,) float32; its gradient is finite also where all channels are 0.
    """
    squared = (_unit(first.float()) - _unit(second.float())).square()  # (B, C, h, w)
    if channel_weights is not None:
        squared = squared * channel_weights[:, None, None]
    return squared.sum(1).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    return features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt()


class PerceptualDistance(nn.Module):
    """Sum over layers of `feature_distance` between the features of two images; frozen, gradients reach the images.

    Args:
        backbone: images (B, 3, H, W) in [-1, 1] -> list of (B, C_l, h_l, w_l).
        linear: (C_l,) channel weights of every layer, as LPIPS learned them; None for 1.
    """

    def __init__(self, backbone: nn.Module, linear: list[Tensor] | None = None) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.layers = None if linear is None else len(linear)
        for index, weight in enumerate(linear or []):
            self.register_buffer(f"linear_{index}", weight)

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,) distances, 0 for equal images."""
        features = self.backbone(decoded)
        with torch.no_grad():
            wanted = self.backbone(images)
        assert self.layers in (None, len(features))
        return sum(
            feature_distance(ours, theirs, getattr(self, f"linear_{index}", None))
            for index, (ours, theirs) in enumerate(zip(features, wanted, strict=True))
        )


class VGG16Features(nn.Module):
    """The five layers of VGG16 that LPIPS compares: the last ReLU before each pooling (Simonyan & Zisserman 2015)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps, before = set(), 3
        for widths in VGG16:
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.taps.add(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # indices, so key names, are torchvision's
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, taken = ((images + 1) / 2 - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                taken.append(x)
        return taken


class EncoderFeatures(nn.Module):
    """The stem and every stage of an autoencoder's encoder as layers: needs no weights beside the autoencoder's own.

    Args:
        encoder: a DC-AE's (`project_in`, `stages`) or AutoencoderKL's (`conv_in`, `down_blocks`); not copied.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.stem = encoder.project_in if hasattr(encoder, "project_in") else encoder.conv_in
        self.stages = encoder.stages if hasattr(encoder, "stages") else encoder.down_blocks

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        taken = [x]
        for stage in self.stages:
            x = stage(x)
            taken.append(x)
        return taken


def load_vgg16(path: Path) -> VGG16Features:
    """Reads torchvision's VGG16 weights (.pth or .safetensors); the classifier's entries are not needed.

    Raises:
        CheckpointError: the file is no VGG16.
    """
    backbone = VGG16Features()
    state = {key: value for key, value in read_file(path).items() if not key.startswith("classifier.")}
    load_exactly(backbone, state, path, "the features of torchvision's vgg16")
    return backbone


def load_linear(path: Path) -> list[Tensor]:
    """Reads the channel weights that LPIPS learned for VGG16 (`lin0.model.1.weight` to `lin4...`, each (1, C, 1, 1)).

    Raises:
        CheckpointError: the file is something else, or holds a negative weight.
    """
    state = read_file(path)
    wanted = {f"lin{index}.model.1.weight": (1, widths[-1], 1, 1) for index, widths in enumerate(VGG16)}
    if {key: tuple(value.shape) for key, value in state.items()} != wanted:
        raise CheckpointError(f"{path} does not hold LPIPS's channel weights for VGG16: {', '.join(wanted)}.")
    if any(value.min() < 0 for value in state.values()):
        raise CheckpointError(f"{path} holds a negative channel weight, which makes no distance.")
    return [state[key].flatten().float() for key in wanted]


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Loads weights whose names and shapes must be the module's own.

    Raises:
        CheckpointError: the first difference, in words.
    """
    own = module.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # absent from old files
    problems = [f"{key} is missing" for key in own if key not in state and key not in counters]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" ({len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path} does not hold {what}: {problems[0]}{more}.")
    module.load_state_dict({key: state.get(key, own[key]) for key in own})
