"""The flow-matching trainer, in a first and simple form: drawn scenes, optional joint training of the text encoder.

The full data pipeline, mixed optimisers, exact resume of data order and scale-out are not here yet. Networks come from
`sana.models`, the noise process from `sana.diffusion`.
"""

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from sana.config import ConfigError, SanaConfig, config_to_dict
from sana.diffusion.flow import add_noise, velocity_target
from sana.models import build_autoencoder, build_text_encoder, build_transformer
from sana.models.metadata import CheckpointMetadata, save_checkpoint
from sana.models.weights import load_weights
from sana.training.captions import CaptionEncoder
from sana.training.ema import ExponentialMovingAverage
from sana.training.muon import Muon, split_parameters
from sana.training.scene_latents import ScenePool
from sana.training.schedule import Progress, lr_factor
from sana.training.train_state import load_train_state, save_train_state
from sana.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class JointTraining:
    """What `train.extra` of the YAML may hold.

    Attributes:
        steps: optimiser steps of the whole run.
        pool_size: cached latents per process.
        refresh: entries of the pool that are redrawn per step and process.
        null_caption_probability: part of the captions replaced by the null caption (for guidance).
        muon_lr: peak learning rate of the matrices.
        adamw_lr: peak learning rate of everything else.
        train_text_encoder: whether the text encoder learns too.
        ema_decay: decay of the average that is exported.
    """

    steps: int = 4000
    pool_size: int = 8000
    refresh: int = 3
    null_caption_probability: float = 0.1
    muon_lr: float = 1.0e-3
    adamw_lr: float = 1.0e-3
    train_text_encoder: bool = True
    ema_decay: float = 0.998


class FlowLoss(nn.Module):
    """(latents, captions, noise, sigma) -> mean squared error of the velocity. Holds both trained networks for DDP."""

    def __init__(self, transformer: nn.Module, captions: CaptionEncoder) -> None:
        super().__init__()
        self.transformer, self.captions = transformer, captions

    def forward(self, latents: Tensor, captions: list[str], dropped: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """latents, noise (B, C, H, W); dropped (B,) bool; sigma (B,) in (0, 1). Returns the loss of each image (B,)."""
        embeds, mask = self.captions(captions, dropped)
        noisy = add_noise(latents, noise, sigma)
        velocity = self.transformer(noisy, sigma * 1000, embeds[:, None], mask=mask)
        return (velocity.float() - velocity_target(latents, noise)).square().flatten(1).mean(1)


class Trainer:
    """Builds everything a configuration names and runs it; `train()` resumes from `work_dir/state.pt` by itself.

    Args:
        config: a validated configuration with `data.type: DrawnScenes`.

    Raises:
        ConfigError: the configuration asks for what this trainer does not do.
    """

    def __init__(self, config: SanaConfig) -> None:
        if config.data.type != "DrawnScenes":
            raise ConfigError(f"data.type is {config.data.type!r}; this trainer reads DrawnScenes only so far.")
        self.config, self.options = config, _options(config.train.extra or {})
        self.accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
        torch.manual_seed(config.train.seed)
        self.work_dir = Path(config.work_dir)
        self.transformer = build_transformer(config).train()
        if config.model.load_from:
            load_weights(self.transformer, config.model.load_from)
        text = build_text_encoder(config, dtype=torch.float32)
        text.model.requires_grad_(self.options.train_text_encoder)
        encoder = CaptionEncoder(
            text.tokenizer, text.model, config.text_encoder.chi_prompt, config.text_encoder.model_max_length
        )
        self.module = FlowLoss(self.transformer, encoder)
        self.ema = ExponentialMovingAverage(self.module, self.options.ema_decay)
        matrices, rest = split_parameters(
            self.module, exclude=("embed_tokens", "final_layer", "x_embedder", "t_block", "t_embedder")
        )
        self.optimizers = [
            Muon([p for p in matrices if p.requires_grad], self.options.muon_lr, weight_decay=0.01),
            torch.optim.AdamW(
                [p for p in rest if p.requires_grad], self.options.adamw_lr, (0.9, 0.98), weight_decay=0.0
            ),
        ]
        self.peak_lrs = (self.options.muon_lr, self.options.adamw_lr)
        self.progress = Progress(self.options.steps, config.train.early_stop_hours * 60)
        self._resume()
        self.ddp = self.accelerator.prepare(self.module)
        rank = self.accelerator.process_index
        self.generator = torch.Generator().manual_seed(config.train.seed + 1000 * rank + self.progress.step * 7919)
        autoencoder = build_autoencoder(config, dtype=torch.float32).to(self.accelerator.device).requires_grad_(False)
        self.pool = ScenePool(
            autoencoder, self.options.pool_size, config.train.seed + 1 + rank + 1000 * self.progress.step,
            self.work_dir / f"scenes_{rank}.pt", show_progress=self.accelerator.is_main_process,
        )  # fmt: skip

    def train(self) -> None:
        """Runs to the end of the schedule and exports the averaged weights."""
        total, losses = self.options.steps, []
        bar = tqdm(
            total=total, initial=self.progress.step, disable=not self.accelerator.is_main_process, mininterval=10
        )
        while (fraction := self._shared_fraction()) < 1:
            losses.append(self.train_step(fraction).item())
            bar.update()
            if self.progress.step % self.config.train.log_interval == 0:
                bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f} at {fraction:.3f}")
                losses.clear()
            if self.progress.step % self.config.train.save_model_steps == 0:
                self.save()
        self.save()

    def train_step(self, fraction: float) -> Tensor:
        """One optimiser step at a point of the schedule; returns the mean loss of this process (0-d, detached)."""
        device, options = self.accelerator.device, self.options
        latents, captions = self.pool.sample(self.config.train.train_batch_size, self.generator)
        latents = latents.to(device)
        dropped = torch.rand(len(captions), generator=self.generator) < options.null_caption_probability
        noise = torch.randn(latents.shape, generator=self.generator).to(device)
        sigma = self._draw_sigma(len(captions)).to(device)
        with self.accelerator.autocast():
            loss = self.ddp(latents, captions, dropped, noise, sigma).mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.train.gradient_clip)
        for optimizer, peak in zip(self.optimizers, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_factor(self.progress.step, fraction)
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.module)
        self.progress.step += 1
        self.pool.refresh(options.refresh)
        return loss.detach()

    def save(self) -> None:
        """Writes the training state and the exported weights (main process only)."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "module": self.module.state_dict(), "ema": self.ema.state_dict(), "step": self.progress.step,
            "seconds": self.progress.seconds, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip
        save_train_state(self.work_dir / "state.pt", state)
        current = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.ema.copy_to(self.module)
        self.export(self.work_dir / "model")
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(current[name])

    def export(self, folder: Path) -> None:
        """Writes `model.safetensors` with metadata and `text_encoder/` in bfloat16; `vae/` is copied by the caller."""
        folder.mkdir(parents=True, exist_ok=True)
        config = config_to_dict(self.config)
        config["vae"]["vae_pretrained"] = "vae"  # beside the file
        config["text_encoder"]["text_encoder_name"] = "text_encoder"
        metadata = CheckpointMetadata(
            arch={"class": type(self.transformer).__name__, "kwargs": self.transformer.init_kwargs},
            precision=self.config.model.mixed_precision,
            flow_shift=self.config.scheduler.flow_shift,
            chi_prompt=list(self.config.text_encoder.chi_prompt),
            license="Apache-2.0",
            config=config,
        )
        save_checkpoint(folder / "model.safetensors", self.transformer, metadata, dtype=torch.bfloat16)
        text = self.module.captions
        stored = copy.deepcopy(text.model).to(torch.bfloat16)  # casting the live model would cut DDP's gradient hooks
        stored.save_pretrained(folder / "text_encoder")
        text.tokenizer.save_pretrained(folder / "text_encoder")

    def _draw_sigma(self, count: int) -> Tensor:
        """Logit-normal, then shifted (Esser et al. 2024, section 3.1 and equation 23)."""
        scheduler = self.config.scheduler
        normal = torch.randn(count, generator=self.generator) * scheduler.logit_std + scheduler.logit_mean
        uniform, shift = torch.sigmoid(normal), scheduler.flow_shift
        return shift * uniform / (1 + (shift - 1) * uniform)

    def _shared_fraction(self) -> float:
        values = [self.progress.fraction]
        broadcast_object_list(values)
        return values[0]

    def _resume(self) -> None:
        state = load_train_state(self.work_dir / "state.pt")
        if state is None:
            return
        self.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        limit = self.config.train.early_stop_hours * 60
        self.progress = Progress(self.options.steps, limit, step=state["step"], seconds=state["seconds"])
        logger.info("resumed %s at step %d", self.work_dir, state["step"])


def _options(extra: dict[str, Any]) -> JointTraining:
    known = {field.name for field in fields(JointTraining)}
    if unknown := sorted(set(extra) - known):
        raise ConfigError(f"train.extra has no key {unknown[0]!r}; it knows {', '.join(sorted(known))}.")
    return JointTraining(**extra)
