"""PatchGAN's patch, hinge losses and the adaptive weight by hand; the discriminator learns to see blur."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sana.training.dcae_discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    judge_frozen,
)


@pytest.mark.parametrize(("num_downsamples", "patch"), [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_the_patch_that_the_paper_names(num_downsamples, patch):
    discriminator = PatchDiscriminator(32, num_downsamples)
    for index, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):  # a norm sees the whole image
            discriminator.layers[index] = nn.Identity()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = images.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == patch and seen.any(1).sum() == patch


def test_an_image_is_judged_alone():
    discriminator, images = PatchDiscriminator(32), torch.randn(3, 3, 64, 64)
    alone = torch.cat([discriminator(image) for image in images.split(1)])
    assert torch.allclose(discriminator(images), alone, atol=1e-6)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 1.25) / 2) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx(2.75 / 2)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = nn.Parameter(torch.randn(4, 5))
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    reconstruction, adversarial = (layer * a).sum(), 3 * (layer * b).sum()
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx((a.norm() / (3 * b.norm() + 1e-6)).item(), rel=1e-5)
    assert not weight.requires_grad and layer.grad is None
    (reconstruction + weight * adversarial).backward()  # the graph is still there
    assert torch.allclose(layer.grad, a + weight * 3 * b)
    assert adaptive_weight((layer * a).sum(), (layer * 0).sum(), layer).item() == 1e4


def test_the_adaptive_weight_balances_a_network():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    decoded = decoder(torch.randn(2, 4, 64, 64))
    reconstruction = (decoded - torch.rand_like(decoded)).abs().mean()
    adversarial = hinge_generator_loss(judge_frozen(PatchDiscriminator(32), decoded))
    weight = adaptive_weight(reconstruction, adversarial, decoder[-1].weight)
    (weight * adversarial).backward(retain_graph=True)
    of_adversary = decoder[-1].weight.grad.norm().item()
    decoder.zero_grad()
    reconstruction.backward()
    assert of_adversary == pytest.approx(decoder[-1].weight.grad.norm().item(), rel=1e-2)


def test_judging_frozen_gives_the_same_logits_and_no_gradient_of_its_own():
    discriminator, images = PatchDiscriminator(32), torch.randn(2, 3, 64, 64, requires_grad=True)
    logits = judge_frozen(discriminator, images)
    assert torch.equal(logits, discriminator(images))
    logits.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_discriminator_learns_to_tell_real_from_blurred():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(32, 1)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-3, (0.5, 0.9))

    def batch():
        coarse = torch.rand(8, 3, 8, 8) * 2 - 1
        real = F.interpolate(coarse, scale_factor=4, mode="nearest")
        return real, F.avg_pool2d(F.pad(real, (2, 2, 2, 2), mode="replicate"), 5, 1)

    for _ in range(30):
        real, blurred = (discriminator(images) for images in batch())
        optimizer.zero_grad()
        hinge_discriminator_loss(real, blurred).backward()
        optimizer.step()
    with torch.no_grad():
        real, blurred = (discriminator(images).mean((1, 2, 3)) for images in batch())
    assert real.min() > blurred.max()
