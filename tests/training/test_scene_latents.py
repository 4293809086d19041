"""The pool of latents: scaled, captioned, reloaded, renewed from the oldest entry on."""

import itertools

import pytest
import torch

from sana.data.scenes import scenes
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.training.dcae_trainer import crops
from sana.training.scene_latents import ScenePool, encode_scenes


@pytest.fixture
def autoencoder(dcae_shape):
    torch.manual_seed(0)
    return DCAE(DCAEConfig(**dcae_shape, scaling_factor=0.5)).eval()


def test_latents_are_those_of_the_autoencoder(autoencoder):
    drawn = list(itertools.islice(scenes(7), 3))
    with torch.no_grad():
        expected = autoencoder.encode(crops(7, 3, whole=True))
    torch.testing.assert_close(encode_scenes(autoencoder, drawn, dtype=torch.float32), expected, atol=1e-4, rtol=1e-4)


def test_the_pool_is_kept_and_renewed(autoencoder, tmp_path):
    pool = ScenePool(autoencoder, 8, 3, tmp_path / "pool.pt")
    assert pool.captions == [scene.caption for scene in itertools.islice(scenes(3), 8)]
    again = ScenePool(autoencoder, 8, 3, tmp_path / "pool.pt")
    assert torch.equal(again.latents, pool.latents)
    old = list(pool.captions)
    pool.refresh(3)
    assert pool.captions[3:] == old[3:]
    assert pool.captions[:3] == [s.caption for s in itertools.islice(scenes(3), 8, 11)]
    latents, captions = pool.sample(5, torch.Generator().manual_seed(0))
    assert latents.shape == (5, 4, 8, 8) and latents.dtype == torch.float32
    assert set(captions) <= set(pool.captions)
