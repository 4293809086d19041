"""What a run shows while it trains: progress bar, log file, trackers, validation pictures."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

from sana.config import SanaConfig, config_to_dict
from sana.training.tracker import Tracker, build_tracker
from sana.training.train_log import LOG_NAME, Throughput, TrainLog, describe, progress_bar
from sana.training.validation import Validator

if TYPE_CHECKING:
    from tqdm import tqdm

    from sana.training.trainer import Trainer


class Report:
    """A context around the training loop. The main process shows; the others only keep count.

    Args:
        trainer: what is reported on.
    """

    bar: "tqdm[Any]"
    log: TrainLog
    tracker: Tracker
    speed: Throughput

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.losses: list[float] = []  # since the last line of the log
        self.grad_norms: list[float] = []
        self.seconds = 0.0  # of the run, with those before it was resumed
        self.validator: Validator | None = None

    def __enter__(self) -> Self:
        trainer, config = self.trainer, self.trainer.config
        if config.train.visualize:
            self.validator = Validator.for_training(
                config, folder=trainer.work_dir / "validation", transformer=trainer.networks.transformer,
                autoencoder=trainer.networks.autoencoder, text_encoder=trainer.networks.text_encoder,
            )  # fmt: skip
            self.validator.prepare()
        self.tracker = build_tracker(
            config.report_to, trainer.work_dir, name=config.name, project=config.tracker_project_name,
            config=config_to_dict(config), resume=trainer.step > 0, step=trainer.step,
            explicit=config.report_to != SanaConfig().report_to,
        )  # fmt: skip
        self.log = TrainLog(trainer.work_dir / LOG_NAME, resume_step=trainer.step)
        self.speed = Throughput(trainer.total_steps, step=trainer.step, seconds=self.seconds)
        self.bar = progress_bar(trainer.total_steps, step=trainer.step)
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.bar, self.log, self.tracker):
            part.close()

    def is_due(self, step: int) -> bool:
        """Whether a line is written after so many steps."""
        return step % self.trainer.config.train.log_interval == 0 or step == self.trainer.total_steps

    def step(self, loss: float, grad_norm: float, *, images: int) -> None:
        """Takes note of a step; every `train.log_interval` steps their mean goes to bar, file and tracker."""
        trainer = self.trainer
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        if not hasattr(self, "bar"):  # a step outside the loop
            return
        self.speed.update(trainer.step, images)
        self.seconds = self.speed.seconds
        self.bar.update()
        if not self.is_due(trainer.step):
            return
        values = {
            "epoch": trainer.epochs,
            "loss": sum(self.losses) / len(self.losses),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
            "images_per_second": self.speed.images_per_second,
        }
        self.log.write({"step": trainer.step, **values, "seconds": self.seconds, "skipped": trainer.guard.count})
        self.tracker.log(values, trainer.step)
        self.bar.set_postfix_str(describe(values, self.speed.seconds_left))
        self.losses, self.grad_norms = [], []

    def validate(self) -> None:
        """Pictures of the validation prompts by the averaged weights. Every process must call it."""
        trainer = self.trainer
        assert self.validator is not None
        trainer.settle()
        with self.speed.paused(), trainer.ema.applied(trainer.objective) if trainer.ema else nullcontext():
            path = self.validator.run(trainer.step)
            trainer.parallel.barrier()
        self.tracker.image("validation", path, trainer.step)

    def state_dict(self) -> dict[str, Any]:
        """The steps that no line of the log holds yet, and the run's time so far."""
        return {"losses": self.losses, "grad_norms": self.grad_norms, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.grad_norms = list(state["losses"]), list(state["grad_norms"])
        self.seconds = state["seconds"]
