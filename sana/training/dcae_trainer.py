"""Trains an autoencoder, or its decoder alone: one step of both networks, what a run saves, and how it goes on.

Losses are in `dcae_losses.py`, the discriminator in `dcae_discriminator.py`, images in `dcae_data.py`, where the
autoencoder comes from and goes to in `dcae_model.py`.
"""

import copy
import math
import signal
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.autoencoder.base import Autoencoder
from sana.models.autoencoder.loading import load_autoencoder
from sana.training.dcae_data import FolderImages, ImageFiles, SceneImages, crops, first_images
from sana.training.dcae_discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    judge_frozen,
)
from sana.training.dcae_losses import (
    EncoderFeatures,
    PerceptualDistance,
    latent_term,
    load_linear,
    load_vgg16,
    reconstruction_terms,
    weighted_sum,
)
from sana.training.dcae_model import (
    CLOSING_LAYERS,
    encoder_of,
    freeze_encoder,
    initial_autoencoder,
    last_layer,
    latent_deviation_of,
)
from sana.training.dcae_options import DCAETraining
from sana.training.ema import ExponentialMovingAverage
from sana.training.muon import Muon, split_parameters
from sana.training.nonfinite import TrainingDivergedError
from sana.training.parallel import Parallel
from sana.training.run_lock import RunLock
from sana.training.schedule import Progress, lr_factor
from sana.training.signals import SignalWatch, StoppedBySignal
from sana.training.train_log import LOG_NAME, Throughput, TrainLog, describe, progress_bar
from sana.training.train_state import load_train_state, save_train_state
from sana.utils.logging import get_logger
from sana.utils.seed import seed_everything

__all__ = ["DCAETrainer", "DCAETraining", "crops", "latent_deviation", "psnr", "train_dcae"]

logger = get_logger(__name__)

STATE_FILE = "state.pt"
FRESH = 2 * 10**6  # seed of scenes that no run trains on


class Reconstruction(nn.Module):
    """images -> (decoded, latents) in one forward call, as DDP needs it; noise is added to the latents in between."""

    def __init__(self, autoencoder: Autoencoder, *, latent_noise: float, frozen: bool) -> None:
        super().__init__()
        self.autoencoder, self.latent_noise, self.frozen = autoencoder, latent_noise, frozen

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> float32 images of that shape and raw latents (B, C, h, w)."""
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            latents = self.autoencoder.raw_encode(images).float()
        strength = self.latent_noise * torch.rand(len(images), 1, 1, 1, device=images.device)
        return self.autoencoder.raw_decode(latents + strength * torch.randn_like(latents)).float(), latents


class DCAETrainer:
    """Builds what the options name, and goes on from `work_dir/state.pt` where there is one.

    Every step's random numbers come from (seed, step, rank) alone, and so do the images: a killed run that goes on
    equals one that was never killed, bit for bit on a CPU, as long as `minutes` is not given.

    Raises:
        ValueError: options that do not fit together, or a work_dir of another run.
        CheckpointError, DataError: weights or images that are not there.
        WorkDirInUseError: another process trains into the work_dir.
    """

    def __init__(self, options: DCAETraining) -> None:
        self.options, self.parallel = options, Parallel(options.mixed_precision)
        self.lock = RunLock(options.work_dir, main=self.parallel.is_main, gather=self.parallel.gather)
        with self.lock.acquired():  # whoever writes into the work_dir after `train` releases it
            self._build()

    def _build(self) -> None:
        options = self.options
        seed_everything(options.seed)
        autoencoder = initial_autoencoder(options.vae_pretrained, options.model, options.residual_gain)
        self.perceptual = _perceptual(options, autoencoder)
        if options.freeze_encoder:
            freeze_encoder(autoencoder)
        reconstruction = Reconstruction(autoencoder, latent_noise=options.latent_noise, frozen=options.freeze_encoder)
        self.discriminator = PatchDiscriminator(options.gan_width) if options.weights.gan else None
        self.autoencoder, self.step, self.images_seen = autoencoder, 0, 0
        self.module = self.parallel.prepare(reconstruction)
        self.ema = ExponentialMovingAverage(autoencoder, options.ema_decay)
        self.optimizers = _optimizers(options, autoencoder)
        self.last_layer = last_layer(autoencoder)
        if self.perceptual is not None:
            self.perceptual.to(self.parallel.device)
        if self.discriminator is not None:
            self.critic = Parallel(options.mixed_precision)
            self.critic_module = self.critic.prepare(self.discriminator)
            self.critic_optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), options.gan_lr, (0.5, 0.9), weight_decay=0.0
            )
        self._resume()

    def train(self) -> Autoencoder:
        """Runs to the end; returns the averaged autoencoder in eval mode.

        Raises:
            StoppedBySignal: after a checkpoint, on SIGTERM or SIGINT.
            TrainingDivergedError: a gradient is not finite; the last checkpoint is intact.
        """
        options, step = self.options, self.step
        progress = Progress(options.steps, options.minutes, step=step, seconds=self.seconds)
        log = TrainLog(options.work_dir / LOG_NAME, resume_step=step)
        try:
            signals = SignalWatch(launched=self.parallel.world_size > 1)
            with signals as watch, progress_bar(options.steps, step=step) as bar:
                self._run(progress, log, watch, bar)
        finally:
            self.images.close()
            log.close()
        self.save(progress)
        self.ema.copy_to(self.autoencoder)
        return self.autoencoder.eval()

    def _run(self, progress: Progress, log: TrainLog, watch: SignalWatch, bar: Any) -> None:
        options, world = self.options, self.parallel.world_size
        speed = Throughput(options.steps, step=self.step, seconds=self.seconds)
        while (fraction := self._agree(progress.fraction, watch, progress)) < 1:
            images = self.images.batch(self.step, fraction).to(self.parallel.device)
            values = self.train_step(images, fraction)
            self.step, progress.step = self.step + 1, self.step + 1
            self.images_seen += len(images) * world
            bar.update()
            speed.update(self.step, len(images) * world)
            if self.step % options.log_every == 0 or self.step == options.steps:
                record = self._record(values) | {"images_per_second": speed.images_per_second}
                log.write({"step": self.step, **record})
                bar.set_postfix_str(f"psnr {record['psnr']:.2f}, {describe(record, speed.seconds_left)}")
            if self.step % options.save_every == 0:
                self.save(progress)

    def train_step(self, images: Tensor, fraction: float) -> dict[str, Tensor | float]:
        """One step of the autoencoder, its average, then one of the discriminator. Returns what the log shows."""
        options = self.options
        warmup = max(1, min(100, options.steps // 10))
        lr = options.lr * lr_factor(self.step, fraction, warmup_steps=warmup)
        _set_lr(self.optimizers, lr)
        seed_everything(_seed(options.seed, self.step, self.parallel.rank))
        adversarial = self.discriminator is not None and self.step >= options.gan_start
        with self.parallel.autocast():
            decoded, latents = self.module(images)
            terms = reconstruction_terms(decoded, images, options.weights, self.perceptual)
            loss = weighted_sum(terms, options.weights)
            if adversarial:
                terms["gan"] = hinge_generator_loss(judge_frozen(self.discriminator, decoded).float())
        if adversarial:
            weight = adaptive_weight(loss, terms["gan"], self.last_layer, self._mean)
            terms["gan_weight"] = weight
            loss = loss + options.weights.gan * weight * terms["gan"]
        if options.weights.latent and not options.freeze_encoder:
            terms["latent"] = latent_term(latents)
            loss = loss + options.weights.latent * terms["latent"]
        self.parallel.backward(loss)
        norm, _ = self.parallel.clip_gradients(1.0)
        if not torch.isfinite(norm):
            raise TrainingDivergedError(
                f"Training diverged: the gradient of step {self.step} is {norm.item()}. The last checkpoint is as it "
                "was; go on from it with a lower lr."
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.autoencoder)
        if adversarial:
            terms["discriminator"] = self._discriminator_step(images, decoded.detach())
        return {name: term.detach() for name, term in ({"loss": loss} | terms).items()} | {"lr": lr, "grad_norm": norm}

    def _discriminator_step(self, images: Tensor, decoded: Tensor) -> Tensor:
        """Both halves in one forward call, as DDP needs it."""
        with self.critic.autocast():
            real, fake = self.critic_module(torch.cat([images, decoded])).float().chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        self.critic.backward(loss)
        self.critic.clip_gradients(1.0)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        return loss

    def _mean(self, tensor: Tensor) -> Tensor:
        return self.parallel.accelerator.reduce(tensor, "mean")

    def _agree(self, fraction: float, watch: SignalWatch, progress: Progress) -> float:
        """The main process's progress; a signal that any process got stops all of them after a checkpoint."""
        fraction, terminated, interrupted = self.parallel.sum(
            fraction if self.parallel.is_main else 0.0,
            watch.asked == signal.SIGTERM,
            watch.asked == signal.SIGINT,
        )
        if terminated or interrupted:
            self.save(progress)
            raise StoppedBySignal(signal.SIGTERM if terminated else signal.SIGINT)
        return fraction

    def _record(self, values: dict[str, Tensor | float]) -> dict[str, float]:
        """Means over processes, and PSNR of the batch from its squared error."""
        means = self.parallel.sum(*(float(value) / self.parallel.world_size for value in values.values()))
        record = dict(zip(values, means, strict=True))
        return record | {"psnr": -10 * math.log10(max(record["mse"], 1e-12) / 4)}

    def save(self, progress: Progress) -> None:
        """Writes `work_dir/state.pt`, whole or not at all. Every process must call it."""
        broken = sorted(set().union(*self.parallel.gather(self.images.broken)))
        if self.parallel.is_main:
            critic = self.discriminator is not None
            save_train_state(self.options.work_dir / STATE_FILE, {
                "recipe": self.options.recipe(), "data": self.images.name,
                "step": self.step, "seconds": progress.seconds, "images_seen": self.images_seen, "broken": broken,
                "model": self.autoencoder.state_dict(), "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "discriminator": self.discriminator.state_dict() if critic else None,
                "critic_optimizer": self.critic_optimizer.state_dict() if critic else None,
            })  # fmt: skip
        self.parallel.barrier()

    def _resume(self) -> None:
        path = self.options.work_dir / STATE_FILE
        state = load_train_state(path)
        self.seconds = 0.0
        if state is None:
            self.images = self._images(())
            return
        recipe = self.options.recipe()
        if changed := [name for name, value in recipe.items() if state["recipe"].get(name) != value]:
            name = changed[0]
            raise ValueError(
                f"{path} is of a run with {name} = {state['recipe'].get(name)}, and {name} is now {recipe[name]}: use "
                "another work_dir, or start from its weights by vae_pretrained."
            )
        self.step, self.seconds, self.images_seen = state["step"], state["seconds"], state["images_seen"]
        self.autoencoder.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.images = self._images(state["broken"])
        if self.images.name != state["data"]:
            raise ValueError(f"{path} is of a run with other images: use another work_dir, or restore them.")
        logger.info("resumed %s at step %d", path, self.step)

    def _images(self, broken: Any) -> SceneImages | FolderImages:
        options, place = self.options, {"rank": self.parallel.rank, "world_size": self.parallel.world_size}
        if not options.data_dir:
            return SceneImages(options.batch_size, options.seed, whole_scene_from=options.whole_scene_from, **place)
        if options.image_size % self.autoencoder.downsample_factor:
            raise ValueError(
                f"image_size is {options.image_size}, which {self.autoencoder.downsample_factor}, the downsampling "
                "factor of this autoencoder, does not divide"
            )
        dataset = ImageFiles(options.data_dir, options.image_size)
        return FolderImages(
            dataset,
            options.batch_size,
            options.seed,
            **place,
            start=self.images_seen,
            workers=options.workers,
            broken=broken,
        )

    def sample_images(self, count: int = 64) -> Tensor:
        """Images to measure on: scenes that are not trained on, or the first of the folder; (count, 3, H, W)."""
        if isinstance(self.images, FolderImages):
            return first_images(self.images.dataset, count)
        return crops(FRESH, count, whole=True)


def train_dcae(options: DCAETraining) -> Autoencoder:
    """Runs or resumes a training; returns the averaged autoencoder in eval mode. See `DCAETrainer`."""
    trainer = DCAETrainer(options)
    try:
        return trainer.train()
    finally:
        trainer.lock.release()


@torch.no_grad()
def psnr(autoencoder: Autoencoder, *, count: int = 64, seed: int = 10**6, images: Tensor | None = None) -> float:
    """Mean PSNR in dB of decode(encode(x)), clamped to [-1, 1], over `images` or freshly drawn whole scenes."""
    values, device = [], next(autoencoder.parameters()).device
    for start in range(0, count if images is None else len(images), 8):
        batch = crops(seed + start, 8, whole=True) if images is None else images[start : start + 8]
        batch = batch.to(device)
        decoded = autoencoder.raw_decode(autoencoder.raw_encode(batch)).clamp(-1, 1)
        values.append(-10 * torch.log10((decoded - batch).square().flatten(1).mean(1) / 4))
    return torch.cat(values).mean().item()


def latent_deviation(autoencoder: Autoencoder, *, count: int = 64, seed: int = FRESH) -> float:
    """Standard deviation of the raw latents of fresh scenes; its inverse is the scaling factor."""
    return latent_deviation_of(autoencoder, crops(seed, count, whole=True))


def _perceptual(options: DCAETraining, autoencoder: Autoencoder) -> PerceptualDistance | None:
    """The distance of the lpips term; its backbone is a frozen copy, so it stays what it was as the encoder learns."""
    if not options.weights.lpips:
        return None
    if options.lpips_weights is None:
        return PerceptualDistance(EncoderFeatures(copy.deepcopy(encoder_of(autoencoder))))
    if options.lpips_weights.is_dir():
        return PerceptualDistance(EncoderFeatures(encoder_of(load_autoencoder(options.lpips_weights))))
    linear = load_linear(options.lpips_linear) if options.lpips_linear else None
    return PerceptualDistance(load_vgg16(options.lpips_weights), linear)


def _optimizers(options: DCAETraining, autoencoder: Autoencoder) -> list[torch.optim.Optimizer]:
    if options.optimizer == "adamw":
        learning = [parameter for parameter in autoencoder.parameters() if parameter.requires_grad]
        return [torch.optim.AdamW(learning, options.lr, (0.9, 0.98), weight_decay=0.0)]
    matrices, rest = split_parameters(autoencoder, exclude=CLOSING_LAYERS)
    return [Muon(matrices, options.lr), torch.optim.AdamW(rest, options.lr, (0.9, 0.98), weight_decay=0.0)]


def _set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def _seed(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one process, far from those of its neighbours."""
    return (seed * 1_000_003 + step * 4099 + rank) % 2**63
