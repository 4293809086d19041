"""Loss terms by hand, the perceptual distance against its formula and against torchvision's network."""

import numpy as np
import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.checkpoint import CheckpointError
from sana.training.dcae_losses import (
    LOSSES,
    EncoderFeatures,
    LossWeights,
    PerceptualDistance,
    feature_distance,
    latent_term,
    load_linear,
    load_vgg16,
    reconstruction_terms,
    weighted_sum,
)


def test_feature_distance_by_hand():
    first = torch.tensor([3.0, 7.0, 4.0, 24.0]).view(1, 2, 1, 2)  # positions (3, 4) and (7, 24)
    second = torch.tensor([0.0, 14.0, 5.0, 48.0]).view(1, 2, 1, 2)  # (0, 5), and (7, 24) at twice the length
    # (0.6, 0.8) - (0, 1) = (0.6, -0.2): 0.36 + 0.04 at the first position, 0 at the second
    assert feature_distance(first, second).item() == pytest.approx((0.36 + 0.04) / 2, rel=1e-5)
    weighted = feature_distance(first, second, torch.tensor([2.0, 0.5]))
    assert weighted.item() == pytest.approx((2 * 0.36 + 0.5 * 0.04) / 2, rel=1e-5)


def test_feature_distance_is_at_most_four_and_its_gradient_finite_at_zero():
    features = torch.rand(2, 3, 4, 4) + 0.1
    assert feature_distance(features, -features).tolist() == pytest.approx([4.0, 4.0], rel=1e-4)
    nothing = torch.zeros(1, 3, 2, 2, requires_grad=True)
    feature_distance(nothing, torch.rand(1, 3, 2, 2)).sum().backward()
    assert nothing.grad.isfinite().all()


def test_perceptual_distance_sums_layers_and_reaches_only_the_images():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, images):
            return [images, self.conv(images)]

    distance = PerceptualDistance(Two())
    decoded, images = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    value = distance(decoded, images)
    layers = [
        feature_distance(a, b) for a, b in zip(Two.forward(distance.backbone, decoded), distance.backbone(images))
    ]
    assert torch.allclose(value, layers[0] + layers[1])
    assert torch.equal(distance(images, images), torch.zeros(2))
    value.sum().backward()
    assert decoded.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=False)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, path)
    return features.eval(), path


def test_vgg16_layers_are_those_of_torchvision(vgg):
    features, path = vgg
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        ours = load_vgg16(path)(images)
        for layer, end in zip(ours, (4, 9, 16, 23, 30)):  # relu1_2, 2_2, 3_3, 4_3, 5_3
            assert torch.allclose(layer, features[:end](x), atol=1e-5)


def test_another_file_is_refused_by_name(vgg, tmp_path):
    state = torch.load(vgg[1], weights_only=True)
    for change, complaint in (
        ({"features.0.weight": None}, "features.0.weight is missing"),
        ({"features.0.bias": torch.zeros(7)}, r"features.0.bias is \(7,\), not \(64,\)"),
        ({"features.99.bias": torch.zeros(7)}, "features.99.bias is unknown"),
    ):
        torch.save({key: value for key, value in (state | change).items() if value is not None}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=complaint):
            load_vgg16(tmp_path / "other.pth")


def test_channel_weights_of_lpips(tmp_path):
    widths = (64, 128, 256, 512, 512)
    state = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(state, tmp_path / "lpips.pth")
    linear = load_linear(tmp_path / "lpips.pth")
    assert [len(weight) for weight in linear] == list(widths)
    assert torch.equal(linear[2], state["lin2.model.1.weight"].flatten())
    torch.save(state | {"lin0.model.1.weight": -torch.ones(1, 64, 1, 1)}, tmp_path / "negative.pth")
    with pytest.raises(CheckpointError, match="negative"):
        load_linear(tmp_path / "negative.pth")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "few.pth")
    with pytest.raises(CheckpointError, match="lin4"):
        load_linear(tmp_path / "few.pth")


def test_the_encoders_layers_lead_to_its_latents(dcae_shape):
    autoencoder = DCAE(DCAEConfig(**dcae_shape)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        layers = EncoderFeatures(autoencoder.encoder)(images)
        assert torch.equal(autoencoder.encoder.project_out(layers[-1]), autoencoder.encoder(images))
    assert len(layers) == 7


def test_reconstruction_terms_by_hand():
    rng = np.random.default_rng(0)
    decoded, images = rng.normal(size=(2, 2, 3, 16, 16)).astype(np.float32)
    everything = LossWeights(1, 1, 1, 1, 0, 1, 0)
    terms = reconstruction_terms(
        *map(torch.from_numpy, (decoded, images)), everything, lambda a, b: (a - b).sum((1, 2, 3))
    )
    error = decoded - images

    def pooled(factor):
        return np.abs(error.reshape(2, 3, 16 // factor, factor, 16 // factor, factor).mean((3, 5))).mean()

    expected = {
        "l1": np.abs(error).mean(), "mse": (error**2).mean(), "lpips": error.sum((1, 2, 3)).mean(),
        "gradient": np.abs(np.diff(error, axis=2)).mean() + np.abs(np.diff(error, axis=3)).mean(),
        "multiscale": sum(pooled(factor) for factor in (2, 4, 8)),
    }  # fmt: skip
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    weights = LossWeights(l1=2.0, mse=0.0, lpips=0.5)
    assert weighted_sum(terms, weights).item() == pytest.approx(2 * expected["l1"] + 0.5 * expected["lpips"], rel=1e-4)


def test_the_latent_term_is_zero_at_unit_variance_only():
    signs = torch.tensor([1.0, -1.0]).repeat(8).view(4, 1, 2, 2)
    unit = signs / signs.std()
    assert latent_term(unit).item() == pytest.approx(0, abs=1e-6)
    shifted = torch.cat([unit * 2 + 3, unit], 1)  # mean 3, std 2; mean 0, std 1
    assert latent_term(shifted).item() == pytest.approx((9 + np.log(2) ** 2) / 2, rel=1e-5)


def test_the_recipe_of_the_bundled_autoencoder_is_kept():
    assert LOSSES["scenes"] == LossWeights(l1=1, mse=2, gradient=0.5, multiscale=0.5, latent=0.1, lpips=0, gan=0)


@pytest.mark.parametrize("weights", [{"l1": -1.0}, {"gan": float("nan")}, {"l1": 0.0}])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        LossWeights(**weights)
