"""The adversarial term of autoencoder training: PatchGAN discriminator, hinge losses, and VQGAN's adaptive weight.

When it starts and how the two networks take turns is in `dcae_trainer.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DELTA = 1e-6  # of the adaptive weight, as in the paper
GREATEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Patches of an image -> one logit each, high for real (PatchGAN, Isola et al. 2017, section 3.2.2: 70 pixels).

    Isola's C64-C128-C256-C512 of 4x4 convolutions. Their batch norm is a group norm here: it looks at one image alone,
    so a batch that is split over processes gives the gradient of the whole batch.

    Args:
        width: channels of the first layer, a multiple of 32.
        num_downsamples: layers with stride 2; the patch is 70 pixels for 3, 34 for 2, 16 for 1.
    """

    def __init__(self, width: int = 64, num_downsamples: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for index in range(1, num_downsamples + 1):
            after = width * min(2**index, 8)
            stride = 2 if index < num_downsamples else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(32, after), nn.LeakyReLU(0.2)]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W at least 32 -> (B, 1, h, w)."""
        return self.layers(images)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 of two sets of logits; 0-d."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean of the logits of decoded images; 0-d."""
    return -fake.mean()


def judge_frozen(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Logits whose gradient reaches the images and not the discriminator (nor DDP's hooks on it)."""
    constants = {name: value.detach() for name, value in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, constants, (images,))


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + 1e-6) at the decoder's last layer (Esser et al. 2021, eq. 7).

    Args:
        reconstruction: 0-d loss; its graph is kept.
        adversarial: 0-d loss; its graph is kept.
        last_layer: the weight at which both gradients are compared.
        average: mean of a tensor over processes, so that the weight is that of the whole batch.

    Returns:
        0-d, without gradient, at most 1e4.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(average(gradient.float()).norm())
    return (norms[0] / (norms[1] + DELTA)).clamp(max=GREATEST_WEIGHT).detach()
