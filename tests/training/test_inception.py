"""Inception features against torchvision's own network, and the pooling of the port that FID uses."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import inception_v3

from sana.models.checkpoint import CheckpointError
from sana.training.inception import InceptionFeatures


def saved(path, classes):
    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=classes, aux_logits=False, init_weights=False).eval()
    torch.save(network.state_dict(), path)
    return network


def test_torchvisions_file_gives_torchvisions_features(tmp_path):
    network = saved(tmp_path / "inception.pth", 1000)
    network.fc = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = network(F.interpolate(images, (299, 299), mode="bilinear", align_corners=False))
    extractor = InceptionFeatures(tmp_path / "inception.pth")
    assert torch.allclose(extractor(images), expected, atol=1e-5)
    assert "not comparable" in extractor.kind


def test_the_file_of_published_fids_pools_as_tensorflow_does(tmp_path):
    saved(tmp_path / "fid.pth", 1008)
    extractor = InceptionFeatures(tmp_path / "fid.pth")
    seen = {}
    for name in ("Mixed_5c", "Mixed_6d", "Mixed_7b", "Mixed_7c"):
        block = getattr(extractor.network, name)
        block.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0]}))
        block.branch_pool.conv.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({f"{name}_pool": inputs[0]})
        )
    assert extractor(torch.rand(1, 3, 32, 32) * 2 - 1).shape == (1, 2048)
    for name in ("Mixed_5c", "Mixed_6d", "Mixed_7b"):
        expected = F.avg_pool2d(seen[name], 3, 1, 1, count_include_pad=False)
        assert torch.allclose(seen[f"{name}_pool"], expected, atol=1e-5)
    assert torch.equal(seen["Mixed_7c_pool"], F.max_pool2d(seen["Mixed_7c"], 3, 1, 1))


def test_another_file_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="1008"):
        InceptionFeatures(tmp_path / "other.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="missing"):
        InceptionFeatures(tmp_path / "part.pth")
