"""The pool of latents: scaled, captioned, renewed from the oldest entry on, resumed exactly."""

import copy
import itertools

import numpy as np
import pytest
import torch

from sana.data.scenes import sample_scene, scenes
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.training.dcae_trainer import crops
from sana.training.scene_latents import SceneBatches, encode_scenes


@pytest.fixture
def autoencoder(dcae_shape):
    torch.manual_seed(0)
    return DCAE(DCAEConfig(**dcae_shape, scaling_factor=0.5)).eval()


def test_latents_are_those_of_the_autoencoder(autoencoder):
    drawn = list(itertools.islice(scenes(7), 3))
    with torch.no_grad():
        expected = autoencoder.encode(crops(7, 3, whole=True))
    torch.testing.assert_close(encode_scenes(autoencoder, drawn, dtype=torch.float32), expected, atol=1e-4, rtol=1e-4)


def batches(autoencoder, **options):
    return SceneBatches(autoencoder, 5, **{"pool_size": 8, "refresh": 3, "seed": 3, **options})


def test_batches_hold_fresh_scenes_with_their_captions(autoencoder):
    source = batches(autoencoder)
    first = source.next_batch()
    assert first.latents.shape == (5, 4, 8, 8) and first.latents.dtype == torch.float32
    drawn = [source_scene(number) for number in range(8)]
    assert set(first.captions) <= {scene.caption for scene in drawn}
    before = list(source.captions)
    source.next_batch()
    assert (
        source.captions[3:6] != before[3:6] and source.captions[:3] == before[:3] and source.captions[6:] == before[6:]
    )
    slot = source.captions[0]
    scene = next(s for s in map(source_scene, range(14)) if s.caption == slot)
    expected = encode_scenes(autoencoder, [scene], dtype=torch.float32)[0]
    torch.testing.assert_close(source.latents[0].float(), expected, rtol=1e-2, atol=1e-2)  # kept in fp16


def source_scene(number):
    return sample_scene(np.random.default_rng((3 * 100_003, number)))


def test_a_saved_state_goes_on_with_the_same_batches(autoencoder):
    whole, broken = batches(autoencoder), batches(autoencoder)
    expected = [whole.next_batch() for _ in range(5)][2:]
    for _ in range(2):
        broken.next_batch()
    state = copy.deepcopy(broken.state_dict())
    resumed = batches(autoencoder)
    resumed.load_state_dict(state)
    for batch in expected:
        again = resumed.next_batch()
        assert torch.equal(batch.latents, again.latents) and batch.captions == again.captions
    assert resumed.epoch == whole.epoch == 0 and resumed.batches_left == whole.batches_left == 95


def test_ranks_draw_scenes_of_their_own(autoencoder):
    sources = [batches(autoencoder, rank=rank) for rank in range(2)]
    for source in sources:
        source.next_batch()
    assert sources[0].captions != sources[1].captions
