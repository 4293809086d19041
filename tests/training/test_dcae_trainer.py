"""The autoencoder's trainer: crops hold objects, the loss falls, a stopped run goes on, PSNR is PSNR."""

import numpy as np
import torch

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import save_autoencoder
from sana.training import dcae_trainer
from sana.training.dcae_trainer import DCAETraining, crops, latent_deviation, psnr, train_dcae


def test_crops_are_in_range_and_each_holds_part_of_an_object():
    batch = crops(5, 16, whole=False)
    assert batch.shape == (16, 3, 128, 128)
    assert batch.min() >= -1 and batch.max() <= 1
    assert all(image.flatten(1).std(1).max() > 0.01 for image in batch)
    assert crops(5, 2, whole=True).shape == (2, 3, 256, 256)
    assert torch.equal(batch, crops(5, 16, whole=False))


def test_psnr_of_a_known_error():
    class Off(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def encoder(self, images):
            return images

        def decoder(self, latents):
            return torch.where(latents > 0, latents - 0.2, latents + 0.2)

    assert abs(psnr(Off(), count=8) - 20 * np.log10(2 / 0.2)) < 1e-3


def test_a_few_steps_lower_the_loss_and_a_stopped_run_goes_on(tmp_path, dcae_shape):
    options = DCAETraining(
        work_dir=tmp_path, model=dcae_shape, steps=30, batch_size=4, lr=3e-3, save_every=10, whole_scene_from=1.1
    )
    torch.manual_seed(0)
    before = psnr(dcae_trainer._initial_model(options), count=8)
    trained = train_dcae(options)
    assert psnr(trained, count=8) > before + 0.5
    state = dcae_trainer.load_train_state(tmp_path / "state.pt")
    assert state["step"] == 30
    again = train_dcae(options)  # nothing is left to do
    for ours, theirs in zip(again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_decoder_only_leaves_the_encoder_alone(tmp_path, dcae_shape):
    torch.manual_seed(0)
    start = DCAE(DCAEConfig(**dcae_shape))
    save_autoencoder(start, tmp_path / "vae")
    options = DCAETraining(work_dir=tmp_path / "run", init=tmp_path / "vae", steps=2, batch_size=2, decoder_only=True)
    tuned = train_dcae(options)
    same = [torch.equal(a, b) for a, b in zip(tuned.encoder.parameters(), start.encoder.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(tuned.decoder.project_in.main.conv.weight, start.decoder.project_in.main.conv.weight)


def test_latent_deviation_is_that_of_fresh_scenes(dcae_shape):
    torch.manual_seed(0)
    autoencoder = DCAE(DCAEConfig(**dcae_shape)).eval()
    with torch.no_grad():
        expected = autoencoder.encoder(crops(2 * 10**6, 4, whole=True)).std().item()
    assert abs(latent_deviation(autoencoder, count=4) - expected) < 1e-6
