"""Trains a small DC-AE on drawn scenes: reconstruction, gradient and multi-scale losses, unit-variance noisy latents.

Sana's own autoencoders are released, not trained here; this makes the one of the bundled model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from sana.data.scenes import CELL, GRID, draw_scene, scenes
from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.models.autoencoder.loading import load_autoencoder
from sana.training.ema import ExponentialMovingAverage
from sana.training.muon import Muon, split_parameters
from sana.training.schedule import Progress, lr_factor
from sana.training.train_state import load_train_state, save_train_state
from sana.utils.logging import get_logger

logger = get_logger(__name__)

CROP_CELLS = 4  # side of a training crop, in lattice cells


@dataclass(frozen=True)
class DCAETraining:
    """Options of a run; `model` holds the fields of `DCAEConfig`."""

    work_dir: Path
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 6000
    minutes: float | None = None
    batch_size: int = 16  # crops per process
    lr: float = 6e-4
    whole_scene_from: float = 0.85  # after this part of the run, batches are whole scenes
    latent_noise: float = 0.15  # largest standard deviation of the noise added to latents before decoding
    residual_gain: float = 0.3  # initial weight of the norm that closes each residual branch
    decoder_only: bool = False  # freeze the encoder: sharpens without moving the latents
    seed: int = 0
    save_every: int = 200
    init: Path | None = None  # autoencoder folder to start from


class ReconstructionLoss(nn.Module):
    """images -> loss. Wraps the autoencoder so that one forward call holds both halves (as DDP needs).

    loss = L1 + 2 MSE + 0.5 L1 of image gradients + 0.5 L1 at 1/2, 1/4 and 1/8 of the size
           + 0.1 (mean^2 + log(std)^2) per latent channel, which keeps latents at unit variance.
    """

    def __init__(self, autoencoder: DCAE, *, latent_noise: float, decoder_only: bool) -> None:
        super().__init__()
        self.autoencoder, self.latent_noise, self.decoder_only = autoencoder, latent_noise, decoder_only

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> (loss, mean squared error), both 0-d."""
        with torch.set_grad_enabled(not self.decoder_only and torch.is_grad_enabled()):
            latents = self.autoencoder.encoder(images).float()
        strength = self.latent_noise * torch.rand(len(images), 1, 1, 1, device=images.device)
        decoded = self.autoencoder.decoder(latents + strength * torch.randn_like(latents)).float()
        mse = F.mse_loss(decoded, images)
        loss = F.l1_loss(decoded, images) + 2 * mse + 0.5 * _gradient_l1(decoded, images)
        for factor in (2, 4, 8):
            loss = loss + 0.5 * F.l1_loss(F.avg_pool2d(decoded, factor), F.avg_pool2d(images, factor))
        if not self.decoder_only:
            flat = latents.transpose(0, 1).flatten(1)  # (C, B h w)
            loss = loss + 0.1 * (flat.mean(1).square() + flat.std(1).log().square()).mean()
        return loss, mse.detach()


def _gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    return sum(F.l1_loss(a.diff(dim=dim), b.diff(dim=dim)) for dim in (2, 3))


def crops(seed: int, batch_size: int, *, whole: bool) -> Tensor:
    """A batch of whole scenes, or of lattice-aligned crops that each contain an object; (B, 3, S, S) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    stream, batch = scenes(seed), []
    for scene in (next(stream) for _ in range(batch_size)):
        image = draw_scene(scene)
        if not whole:
            item = scene.objects[int(rng.integers(len(scene.objects)))]
            corner = []
            for start in (item.row, item.column):
                low, high = max(0, start + item.cells - CROP_CELLS), min(start, GRID - CROP_CELLS)
                corner.append(CELL * int(rng.integers(min(low, high), max(low, high) + 1)))
            image = image[corner[0] : corner[0] + CELL * CROP_CELLS, corner[1] : corner[1] + CELL * CROP_CELLS]
        batch.append(torch.from_numpy(image))
    return torch.stack(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(autoencoder: nn.Module, *, count: int = 64, seed: int = 10**6) -> float:
    """Mean PSNR in dB over freshly drawn whole scenes, of decode(encode(x)) clamped to [-1, 1]."""
    values = []
    device = next(autoencoder.parameters()).device
    with torch.no_grad():
        for start in range(0, count, 8):
            images = crops(seed + start, 8, whole=True).to(device)
            decoded = autoencoder.decoder(autoencoder.encoder(images)).clamp(-1, 1)
            values.append(-10 * torch.log10((decoded - images).square().flatten(1).mean(1) / 4))
    return torch.cat(values).mean().item()


def train_dcae(options: DCAETraining) -> DCAE:
    """Runs or resumes a training; returns the averaged model (also in `work_dir/state.pt` under "ema").

    Under torchrun each process draws its own scenes and gradients are averaged.
    """
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    torch.manual_seed(options.seed)
    autoencoder = _initial_model(options)
    ema = ExponentialMovingAverage(autoencoder, 0.998)
    module = ReconstructionLoss(autoencoder, latent_noise=options.latent_noise, decoder_only=options.decoder_only)
    if options.decoder_only:
        autoencoder.encoder.requires_grad_(False)
    matrices, rest = split_parameters(autoencoder, exclude=("decoder.project_out", "encoder.project_in"))
    optimizers = [Muon(matrices, options.lr), torch.optim.AdamW(rest, options.lr, (0.9, 0.98), weight_decay=0.0)]
    path = options.work_dir / "state.pt"
    state = load_train_state(path)
    step, seconds = 0, 0.0
    if state is not None:
        autoencoder.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        logger.info("resumed %s at step %d", path, step)
    module = accelerator.prepare(module)
    progress = Progress(options.steps, options.minutes, step=step, seconds=seconds)
    bar = tqdm(total=options.steps, initial=step, disable=not accelerator.is_main_process, mininterval=10)
    while (fraction := _shared(progress.fraction)) < 1:
        step = progress.step
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(step, fraction)
        whole = fraction >= options.whole_scene_from
        count = max(2, options.batch_size // 4) if whole else options.batch_size
        seed = options.seed + (step * accelerator.num_processes + accelerator.process_index) * 1000 + 17
        with accelerator.autocast():
            loss, mse = module(crops(seed, count, whole=whole).to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(autoencoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(autoencoder)
        progress.step += 1
        bar.update()
        if progress.step % 50 == 0:
            bar.set_postfix_str(
                f"loss {loss.item():.4f} psnr {-10 * torch.log10(mse / 4).item():.2f} at {fraction:.2f}"
            )
        if accelerator.is_main_process and progress.step % options.save_every == 0:
            _save(path, autoencoder, ema, optimizers, progress)
    if accelerator.is_main_process:
        _save(path, autoencoder, ema, optimizers, progress)
    ema.copy_to(autoencoder)
    return autoencoder.eval()


def latent_deviation(autoencoder: DCAE, *, count: int = 64, seed: int = 2 * 10**6) -> float:
    """Standard deviation of the raw latents of fresh scenes; its inverse is the scaling factor."""
    with torch.no_grad():
        return autoencoder.encoder(crops(seed, count, whole=True)).std().item()


def _initial_model(options: DCAETraining) -> DCAE:
    if options.init is not None:
        return load_autoencoder(options.init, dtype=torch.float32).train()
    autoencoder = DCAE(DCAEConfig(**options.model))
    _damp_residuals(autoencoder, options.residual_gain)
    return autoencoder


def _damp_residuals(autoencoder: nn.Module, gain: float) -> None:
    """Starts every residual branch small: without it the activations of a fresh stack grow stage by stage."""
    for name, parameter in autoencoder.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.constant_(parameter, gain)


def _shared(fraction: float) -> float:
    """The main process's progress, so that all processes stop after the same step."""
    values = [fraction]
    broadcast_object_list(values)
    return values[0]


def _save(path: Path, model: nn.Module, ema: ExponentialMovingAverage, optimizers: list, progress: Progress) -> None:
    state = {
        "model": model.state_dict(), "ema": ema.state_dict(), "step": progress.step, "seconds": progress.seconds,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }  # fmt: skip
    save_train_state(path, state)
