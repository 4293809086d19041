"""The autoencoder's trainer: the loss falls, a killed run ends as an unbroken one, a frozen encoder stays as it is."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import load_autoencoder, save_autoencoder
from sana.training.dcae_losses import LossWeights
from sana.training.dcae_model import initial_autoencoder, write_autoencoder
from sana.training.dcae_trainer import DCAETrainer, DCAETraining, crops, latent_deviation, psnr, train_dcae
from sana.training.nonfinite import TrainingDivergedError
from sana.training.schedule import Progress
from sana.training.signals import StoppedBySignal
from sana.training.train_log import read_train_log
from sana.training.train_state import load_train_state
from tests.training.conftest import SHAPE

EVERYTHING = LossWeights(l1=1.0, mse=0.5, gradient=0.1, multiscale=0.1, latent=0.1, lpips=0.1, gan=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`vae/`, and `images/` with five images: an epoch ends within a step."""
    root, rng = tmp_path_factory.mktemp("dcae"), np.random.default_rng(0)
    torch.manual_seed(0)
    save_autoencoder(DCAE(DCAEConfig(**SHAPE)), root / "vae")
    (root / "images").mkdir()
    for index in range(5):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((70, 64), Image.Resampling.BICUBIC).save(root / "images" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def unbroken(root):
    """Options of a run that was never stopped."""
    options = DCAETraining(
        work_dir=root / "run", vae_pretrained=root / "vae", data_dir=(str(root / "images"),), image_size=64, seed=0,
        steps=6, batch_size=2, weights=EVERYTHING, gan_start=2, gan_width=32, mixed_precision="fp32", log_every=1,
        save_every=100,
    )  # fmt: skip
    train_dcae(options)
    return options


@pytest.fixture
def options(unbroken, tmp_path):
    return dataclasses.replace(unbroken, work_dir=tmp_path / "run")


def differences(first, second, where=""):
    """Names of entries that are not equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [name for key in first for name in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, list):
        return [
            name
            for i, pair in enumerate(zip(first, second, strict=True))
            for name in differences(*pair, f"{where}/{i}")
        ]
    return [] if first == second else [where]


def test_psnr_of_a_known_error():
    class Off(Autoencoder):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def raw_encode(self, images, generator=None):
            return images

        def raw_decode(self, latents):
            return torch.where(latents > 0, latents - 0.2, latents + 0.2)

    assert abs(psnr(Off(), count=8) - 20 * np.log10(2 / 0.2)) < 1e-3
    assert abs(psnr(Off(), images=torch.rand(3, 3, 8, 8)) - 20 * np.log10(2 / 0.2)) < 1e-3


def test_a_few_steps_lower_the_loss_and_a_finished_run_is_left_alone(tmp_path, dcae_shape):
    options = DCAETraining(
        work_dir=tmp_path, model=dcae_shape, steps=30, batch_size=4, lr=3e-3, save_every=10, whole_scene_from=1.1
    )
    torch.manual_seed(0)
    before = psnr(initial_autoencoder(None, dcae_shape, options.residual_gain), count=8)
    trained = train_dcae(options)
    assert psnr(trained, count=8) > before + 0.5
    assert load_train_state(tmp_path / "state.pt")["step"] == 30
    again = train_dcae(options)  # nothing is left to do
    for ours, theirs in zip(again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def stop_at(trainer, step, signum):
    """The process gets a signal while it reads the images of a step; that step is still done."""
    read = trainer.images.batch

    def batch(number, fraction):
        if number == step:
            os.kill(os.getpid(), signum)
        return read(number, fraction)

    trainer.images.batch = batch


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_that_goes_on_equals_an_unbroken_one(unbroken, options, signum, code):
    trainer = DCAETrainer(options)
    stop_at(trainer, 3, signum)
    with pytest.raises(StoppedBySignal) as caught:
        trainer.train()
    assert caught.value.exit_code == code
    assert load_train_state(options.work_dir / "state.pt")["step"] == 4
    np.random.seed(1)  # whatever state the process is in
    torch.manual_seed(1)
    train_dcae(options)
    states = [load_train_state(run.work_dir / "state.pt") for run in (unbroken, options)]
    assert differences(*states) == ["/seconds"]
    assert states[1]["images_seen"] == 12
    logs = [read_train_log(run.work_dir / "train_log.jsonl") for run in (unbroken, options)]
    for record in logs[0] + logs[1]:
        assert record.pop("images_per_second") >= 0
    assert [record["step"] for record in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert logs[0] == logs[1]


def test_a_killed_run_goes_on_from_its_last_checkpoint(unbroken, options):
    killed = dataclasses.replace(options, save_every=2)
    trainer = DCAETrainer(killed)
    read = trainer.images.batch

    def batch(number, fraction):
        if number == 5:
            raise KeyboardInterrupt  # no checkpoint is written on this way out
        return read(number, fraction)

    trainer.images.batch = batch
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert load_train_state(killed.work_dir / "state.pt")["step"] == 4
    train_dcae(killed)
    states = [load_train_state(run.work_dir / "state.pt") for run in (unbroken, killed)]
    assert differences(*states) == ["/seconds"]
    assert [record["step"] for record in read_train_log(killed.work_dir / "train_log.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("mixed_precision", ["fp32", "bf16"])
def test_a_frozen_encoder_gives_the_same_latents_bit_for_bit(tmp_path, root, options, mixed_precision):
    options = dataclasses.replace(options, freeze_encoder=True, steps=3, mixed_precision=mixed_precision)
    tuned, before = train_dcae(options), load_autoencoder(root / "vae")
    write_autoencoder(tuned, tmp_path / "tuned", torch.float32)
    images, after = crops(3, 2, whole=False), load_autoencoder(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(after.encode(images), before.encode(images))
        assert not torch.equal(after.decode(before.encode(images)), before.decode(before.encode(images)))
    state = load_train_state(options.work_dir / "state.pt")
    learned = sum(len(optimizer["param_groups"][0]["params"]) for optimizer in state["optimizers"])
    assert learned == len(list(before.decoder.parameters()))


def test_the_average_is_taken_after_the_step(options):
    trainer = DCAETrainer(options)
    before = {name: p.detach().clone() for name, p in trainer.autoencoder.named_parameters()}
    trainer.train_step(trainer.images.batch(0, 0.0), 0.0)
    decay = 2 / 11  # of the first update
    for name, after in trainer.autoencoder.named_parameters():
        expected = decay * before[name] + (1 - decay) * after.detach()
        assert torch.allclose(trainer.ema.average[name], expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(before[name], after) for name, after in trainer.autoencoder.named_parameters())


def test_the_discriminator_begins_at_its_step(options):
    trainer = DCAETrainer(dataclasses.replace(options, gan_start=1))
    before = {name: tensor.clone() for name, tensor in trainer.discriminator.state_dict().items()}
    images = trainer.images.batch(0, 0.0)
    assert "gan" not in trainer.train_step(images, 0.0)
    assert not differences(before, trainer.discriminator.state_dict())
    trainer.step = 1
    values = trainer.train_step(images, 0.0)
    assert {"gan", "gan_weight", "discriminator"} <= values.keys()
    assert values["gan_weight"] > 0
    assert differences(before, trainer.discriminator.state_dict())


def test_the_loss_is_the_sum_of_its_weighted_terms(options):
    trainer = DCAETrainer(dataclasses.replace(options, gan_start=0))
    values = trainer.train_step(trainer.images.batch(0, 0.0), 0.0)
    terms = {name: weight for name, weight in vars(EVERYTHING).items() if name != "gan"}
    expected = sum(weight * values[name] for name, weight in terms.items())
    expected = expected + 0.5 * values["gan_weight"] * values["gan"]
    assert values["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_divergence_stops_the_run_and_spoils_nothing(options):
    trainer = DCAETrainer(options)
    trainer.save(Progress(6))
    before = load_train_state(options.work_dir / "state.pt")
    trainer.images.batch = lambda step, fraction: torch.full((2, 3, 64, 64), torch.nan)
    with pytest.raises(TrainingDivergedError, match="lower lr"):
        trainer.train()
    assert not differences(before, load_train_state(options.work_dir / "state.pt"))


def test_another_recipe_or_other_images_are_refused(tmp_path, root, options):
    folder = shutil.copytree(root / "images", tmp_path / "images")
    options = dataclasses.replace(options, data_dir=(str(folder),))
    trainer = DCAETrainer(options)
    trainer.save(Progress(6))
    with pytest.raises(ValueError, match="freeze_encoder = False"):
        DCAETrainer(dataclasses.replace(options, freeze_encoder=True))
    DCAETrainer(dataclasses.replace(options, steps=9, save_every=1))
    (folder / "4.png").unlink()
    with pytest.raises(ValueError, match="other images"):
        DCAETrainer(options)
    with pytest.raises(ValueError, match="does not divide"):
        DCAETrainer(dataclasses.replace(options, work_dir=tmp_path / "new", image_size=80))


def test_latent_deviation_is_that_of_fresh_scenes(dcae_shape):
    torch.manual_seed(0)
    autoencoder = DCAE(DCAEConfig(**dcae_shape)).eval()
    with torch.no_grad():
        expected = autoencoder.encoder(crops(2 * 10**6, 4, whole=True)).std().item()
    assert abs(latent_deviation(autoencoder, count=4) - expected) < 1e-6


TWO = """
import os, signal, sys
from pathlib import Path
from sana.training.dcae_losses import LossWeights
from sana.training.dcae_trainer import DCAETrainer, DCAETraining
from sana.training.signals import StoppedBySignal

root = Path(sys.argv[1])
def options(name, batch_size, **more):
    return DCAETraining(
        work_dir=root / name, vae_pretrained=root / "vae", data_dir=(str(root / "images"),), image_size=64, steps=4,
        batch_size=batch_size, weights=LossWeights(l1=1.0, lpips=0.1, gan=0.5), gan_start=1, mixed_precision="fp32",
        latent_noise=0.0, log_every=1, gan_width=32, **more)

if sys.argv[2] == "one":
    DCAETrainer(options("one", 2)).train()
    raise SystemExit
DCAETrainer(options("two", 1)).train()
trainer = DCAETrainer(options("stopped", 1))
read = trainer.images.batch
def batch(step, fraction):
    if step == 1 and trainer.parallel.rank == 1:  # one process alone is told
        os.kill(os.getpid(), signal.SIGTERM)
    return read(step, fraction)
trainer.images.batch = batch
try:
    trainer.train()
    raise SystemExit("the signal was not heard")
except StoppedBySignal as stopped:
    assert stopped.exit_code == 143 and trainer.step == 2, trainer.step
DCAETrainer(options("stopped", 1)).train()
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_their_batch_and_resume_exactly(tmp_path, root):
    for name in ("vae", "images"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "two.py").write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for command in ([*launcher, "two.py", str(tmp_path), "two"], [sys.executable, "two.py", str(tmp_path), "one"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two, stopped = (load_train_state(tmp_path / name / "state.pt") for name in ("one", "two", "stopped"))
    assert differences(two, stopped) == ["/seconds"]
    assert one["images_seen"] == two["images_seen"] == 8
    begin = load_autoencoder(root / "vae").state_dict()
    moved, apart = (
        torch.cat([(one["model"][name] - other[name]).flatten() for name in begin]).norm()
        for other in (begin, two["model"])
    )
    assert apart < 0.02 * moved  # the orders of summation differ, and the first Muon and Adam steps are nearly signs
