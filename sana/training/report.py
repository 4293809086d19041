"""What a run shows: progress bar, log file, trackers, validation pictures, the bundle of a diverged run."""

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from sana.config import SanaConfig, config_to_dict
from sana.training.tracker import build_tracker
from sana.training.train_log import TrainLog
from sana.training.validation import Validator
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from sana.training.trainer import Trainer

logger = get_logger(__name__)


class Report:
    """A context around the training loop. The main process shows; the others only keep count.

    Args:
        trainer: what is reported on.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.losses: list[float] = []  # since the last line of the log
        self.grad_norms: list[float] = []
        self.images = 0
        self.since = time.monotonic()
        self.bar: tqdm | None = None
        self.log: TrainLog | None = None
        self.tracker: Any = None
        self.validator: Validator | None = None

    def __enter__(self) -> Self:
        trainer, config = self.trainer, self.trainer.config
        self.since = time.monotonic()
        if trainer.parallel.is_main:
            self.bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit="step", mininterval=1)
            self.log = TrainLog(trainer.work_dir / "train_log.jsonl", resume_step=trainer.step)
            self.tracker = build_tracker(
                config.report_to, trainer.work_dir, name=config.name, project=config.tracker_project_name,
                config=config_to_dict(config), resume=trainer.step > 0, step=trainer.step,
                explicit=config.report_to != SanaConfig().report_to,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.bar, self.log, self.tracker):
            if part is not None:
                part.close()

    def step(self, loss: float, grad_norm: float, *, images: int) -> None:
        """Takes note of a step; every `train.log_interval` steps their mean goes to bar, file and tracker."""
        trainer = self.trainer
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.images += images
        if self.bar is not None:
            self.bar.update()
        if trainer.step % trainer.config.train.log_interval and trainer.step != trainer.total_steps:
            return
        seconds = time.monotonic() - self.since
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
            "images_per_second": self.images / seconds,
            "epoch": trainer.epochs,
        }
        if self.log is not None:
            self.log.write({"step": trainer.step, **values, "seconds": seconds, "skipped": trainer.guard.count})
            self.tracker.log(values, trainer.step)
            self.bar.set_postfix_str(
                f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {values['images_per_second']:.1f} images/s"
            )
        self.losses, self.grad_norms, self.images, self.since = [], [], 0, time.monotonic()

    def validate(self) -> None:
        """Pictures of the validation prompts by the averaged weights. Every process must call it."""
        trainer = self.trainer
        with trainer.ema.applied(trainer.objective) if trainer.ema else nullcontext():
            if trainer.parallel.is_main or trainer.parallel.sharded:  # shards are computed with by all together
                if self.validator is None:
                    self.validator = Validator.for_training(
                        trainer.config, folder=trainer.work_dir / "validation",
                        transformer=trainer.networks.transformer,
                        autoencoder=trainer.networks.autoencoder, text_encoder=trainer.networks.text_encoder,
                    )  # fmt: skip
                path = self.validator.run(trainer.step)
                if path is not None:
                    self.tracker.image("validation", path, trainer.step)
            trainer.parallel.barrier()

    def state_dict(self) -> dict[str, Any]:
        """The steps that no line of the log holds yet."""
        return {"losses": self.losses, "grad_norms": self.grad_norms, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.grad_norms = list(state["losses"]), list(state["grad_norms"])
        self.images = state["images"]
