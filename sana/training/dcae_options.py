"""Options of autoencoder training, and which of them fit together. What they do is in `dcae_trainer.py`."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.training.dcae_losses import LOSSES, LossWeights

OPTIMIZERS = ("muon", "adamw")


@dataclass(frozen=True)
class DCAETraining:
    """Options of a run; without `vae_pretrained`, `model` holds the fields of `DCAEConfig`.

    A run in a `work_dir` that holds a state goes on from it; it equals an unbroken one if only steps, minutes,
    save_every, log_every and workers were changed. A change of `recipe()` is refused.
    """

    work_dir: Path
    model: dict[str, Any] = field(default_factory=dict)
    vae_pretrained: str | Path | None = None  # any autoencoder that the project loads
    freeze_encoder: bool = False  # trains the decoder: the latents of every image stay bit for bit
    data_dir: tuple[str, ...] = ()  # folders of images; none: drawn scenes
    image_size: int = 256  # of folder images, pixels
    workers: int = 0  # processes that read folder images ahead
    steps: int = 6000
    minutes: float | None = None  # at most; the schedule ends with it, so a run with it depends on the machine's speed
    batch_size: int = 16  # images per process
    lr: float = 6e-4
    optimizer: str = "muon"  # Muon for matrices and AdamW for the rest, or "adamw" for all
    ema_decay: float = 0.998
    mixed_precision: str = "bf16"  # or "fp32"
    weights: LossWeights = LOSSES["scenes"]
    lpips_weights: Path | None = (
        None  # VGG16 file, or folder of an autoencoder; None: the encoder that training starts from
    )
    lpips_linear: Path | None = None  # LPIPS's channel weights for VGG16
    gan_start: int = 0  # step at which the discriminator begins
    gan_lr: float = 2e-4
    gan_width: int = 64  # channels of the discriminator's first layer, a multiple of 32
    whole_scene_from: float = 0.85  # after this part of the run, batches of drawn scenes are whole scenes
    latent_noise: float = 0.15  # largest standard deviation of the noise added to latents before decoding
    residual_gain: float = 0.3  # initial weight of the norm that closes each residual branch of a fresh model
    seed: int = 0
    save_every: int = 200
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.mixed_precision not in ("bf16", "fp32"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}; choose bf16 or fp32")
        for name in ("steps", "batch_size", "image_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.freeze_encoder and self.vae_pretrained is None:
            raise ValueError("freeze_encoder needs vae_pretrained: a fresh encoder that never learns is of no use")
        if self.weights.lpips and self.lpips_weights is None and self.vae_pretrained is None:
            raise ValueError(
                "the loss has an lpips term, and a fresh encoder has no features to compare: give lpips_weights, a "
                "VGG16 file or the folder of an autoencoder"
            )
        if self.lpips_linear is not None and (self.lpips_weights is None or self.lpips_weights.is_dir()):
            raise ValueError("lpips_linear holds channel weights for VGG16: give its file as lpips_weights")

    def recipe(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        kept = (
            "model",
            "vae_pretrained",
            "freeze_encoder",
            "weights",
            "gan_start",
            "gan_width",
            "optimizer",
            "mixed_precision",
            "seed",
        )
        return {name: _plain(getattr(self, name)) for name in kept}


def _plain(value: Any) -> Any:
    """A value as `torch.load(weights_only=True)` gives it back."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else copy.deepcopy(value)
