"""The trainer: one step of flow matching, and the loop around it. What a run is made of is put together in build.py.

Storage is in checkpoints.py and run_state.py, parallelism in parallel.py, what people see in tracker.py,
train_log.py and validation.py.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sana.config import ConfigError, SanaConfig
from sana.config_extra import train_extra
from sana.data.collate import Batch
from sana.data.sample import DataError
from sana.data.transforms import fit_to_factor, normalise_images
from sana.models.layers.finite import first_nonfinite_layer
from sana.training import run_state
from sana.training.build import (
    build_data,
    build_networks,
    build_objective,
    check_trainable,
    choose_kernels,
    noise_options,
    require_start,
)
from sana.training.checkpoints import Checkpoints, check_writable
from sana.training.device_batches import DeviceCopies
from sana.training.ema import ExponentialMovingAverage
from sana.training.lr_scheduler import build_lr_scheduler
from sana.training.nonfinite import Evidence, NonFiniteGuard
from sana.training.objective import draw
from sana.training.optimizer import auto_scale_lr, build_optimizer, fsdp_refusal
from sana.training.parallel import Parallel
from sana.training.report import Report
from sana.training.run_lock import RunLock
from sana.training.signals import SignalWatch, StoppedBySignal
from sana.training.skipping import skips_on_device, step_unless, uncount_step
from sana.training.text import embed_captions
from sana.utils.logging import get_logger
from sana.utils.seed import seed_everything
from sana.utils.transfer import PendingNumbers

logger = get_logger(__name__)


@dataclass(frozen=True)
class _OpenStep:
    """A step whose gradients are computed and whose numbers the host has not read.

    Attributes:
        number: of the step, from 0.
        samples: images that the run had seen before it.
        batches: micro-batches of this process.
        total: sum of the weights of its images, over all processes.
        taken: whether the optimiser's step has been asked for, to be left out by the device if it is not finite.
        numbers: loss, norm of the gradient, loss of this process, norms of all gradients.
    """

    number: int
    samples: int
    batches: list[Batch]
    total: float
    taken: bool
    numbers: PendingNumbers


class Trainer:
    """Trains what a configuration describes; a run whose work_dir holds checkpoints goes on from the newest one.

    Args:
        config: a validated configuration.

    Raises:
        ConfigError: the configuration asks for what cannot be done.
        DataError: there is no usable data, or processes disagree about it.
        CheckpointError, FetchError: weights do not fit or cannot be had.
        WorkDirInUseError: another process trains into the work_dir.
    """

    def __init__(self, config: SanaConfig) -> None:
        self.config, self.extra = config, train_extra(config.train.extra)
        check_trainable(config, self.extra)
        self.work_dir = Path(config.work_dir)
        check_writable(self.work_dir)
        require_start(config)
        self.parallel = Parallel(config.model.mixed_precision, use_fsdp=config.train.use_fsdp)
        self.lock = RunLock(self.work_dir, main=self.parallel.is_main, gather=self.parallel.gather)
        with self.lock.acquired():  # until `train` ends: two runs would spoil each other's files
            self._build()

    def _build(self) -> None:
        config = self.config
        seed_everything(config.train.seed)  # every process starts from the same weights
        self.networks = build_networks(config, self.extra)
        choose_kernels(self.networks.transformer, self.extra, self.parallel.device)
        self.objective = build_objective(config, self.extra, self.networks)
        self.wrapped = self.parallel.prepare(self.objective, self.objective.parts())
        for network in (self.networks.autoencoder, self.networks.text_encoder):
            if isinstance(network, torch.nn.Module):
                network.to(self.parallel.device)
        self.noise = noise_options(config, self.extra)
        self.data = build_data(config, self.extra, self.parallel, self.networks)
        self._check_agreement()
        self._build_optimizer()
        self.ema = ExponentialMovingAverage(self.objective, config.train.ema_rate) if config.train.ema_update else None
        self.guard = NonFiniteGuard(self.extra.nonfinite_budget, self.work_dir / "nonfinite")
        self.checkpoints = Checkpoints(
            self.work_dir / "checkpoints", rank=self.parallel.rank, world_size=self.parallel.world_size,
            keep_last=self.extra.keep_last, keep_every=self.extra.keep_every, asynchronous=self.extra.async_save,
        )  # fmt: skip
        self.step = self.samples = 0  # optimiser steps done; images seen by all processes
        self.copies = DeviceCopies(self.parallel.device)
        self.ahead = (
            self.parallel.device.type == "cuda"
        )  # steps are asked for before the one before is known to be good
        self._open: _OpenStep | None = None
        self._trained: list[str] = []  # parameters with a gradient
        self.report = Report(self)
        run_state.resume(self)

    def train(self) -> None:
        """Runs to the end, or until a signal or `train.early_stop_hours`; either way the state is saved.

        Raises:
            StoppedBySignal: SIGTERM or SIGINT came; the checkpoint is written.
            TrainingDivergedError: too many steps with a loss or gradient that is not finite.
            WorkDirInUseError: another process trains into the work_dir by now.
        """
        self.lock.acquire()
        try:
            self._train()
        finally:
            self.lock.release()

    def _train(self) -> None:
        train, started, epochs, stop = self.config.train, time.monotonic(), self.epochs, 0.0
        with SignalWatch(launched=self.parallel.world_size > 1) as signals, self.report:
            while self.step < self.total_steps:
                self.train_step([self.data.next_batch() for _ in range(train.gradient_accumulation_steps)])
                hours = (time.monotonic() - started) / 3600
                late, stop = self.parallel.max(hours > train.early_stop_hours, signals.asked)
                ended, epochs = self.epochs != epochs, self.epochs
                due = self.step % train.save_model_steps == 0 or (ended and epochs % train.save_model_epochs == 0)
                if due or late or stop or self.step == self.total_steps:
                    with self.report.speed.paused():
                        run_state.save(self)
                        self.report.log.sync()
                if train.visualize and self.step % train.eval_sampling_steps == 0:
                    self.report.validate()
                if late or stop:
                    break
            self.checkpoints.wait()
            self.parallel.barrier()  # none leaves before the main process has written: a launcher would end that too
            if stop:
                raise StoppedBySignal(int(stop))
        if self.step >= self.total_steps:
            run_state.export(self, self.work_dir / "model")

    def train_step(self, batches: list[Batch]) -> None:
        """One optimiser step over the micro-batches of every process: the gradient of their common mean loss.

        Args:
            batches: this process's micro-batches, each of B images.
        """
        (total,) = self.parallel.sum(sum(float(batch.weights.sum()) for batch in batches))
        mine, size = torch.zeros((), dtype=torch.float64, device=self.parallel.device), len(batches[0].keys)
        for number, batch in enumerate(batches):
            first = self.samples + (number * self.parallel.world_size + self.parallel.rank) * size
            with self.parallel.accumulate(last=number + 1 == len(batches)):
                copied = self.copies(batch)
                losses = self.losses(copied, first)
                share = (losses * copied.weights.to(losses)).sum()
                self.parallel.backward(share * (self.parallel.world_size / max(total, 1.0)))  # processes are averaged
            mine += share.detach()
        norm, norms = self.parallel.clip_gradients(self.config.train.gradient_clip)
        self.settle()
        self._open = self._take(batches, total, self.parallel.sum_on_device(mine) / max(total, 1.0), norm, mine, norms)
        self.step += 1
        self.samples += len(batches) * size * self.parallel.world_size
        if not self._open.taken or self.report.is_due(self.step):
            self.settle()
        self.optimizer.zero_grad()

    def _take(
        self, batches: list[Batch], total: float, loss: Tensor, norm: Tensor, mine: Tensor, norms: Tensor | None
    ) -> _OpenStep:
        """Asks for the optimiser's step where the device can leave it out by itself; `settle` decides it otherwise.

        That needs an optimiser which knows how. Loss scaling and shards have rules of their own.
        """
        plain = not self.parallel.sharded and self.parallel.mixed_precision != "fp16"
        taken = self.ahead and plain and total > 0 and skips_on_device(self.optimizer)
        if taken:
            step_unless(self.optimizer, ~(torch.isfinite(loss) & torch.isfinite(norm)))
        numbers = torch.stack([loss, norm.double(), mine])
        if norms is not None:
            numbers = torch.cat([numbers, norms.double()])
            if len(self._trained) != len(norms):
                self._trained = [name for name, one in self.objective.named_parameters() if one.grad is not None]
        return _OpenStep(self.step, self.samples, batches, total, taken, PendingNumbers(numbers))

    def settle(self) -> None:
        """Ends the step before: guard, optimiser (unless it was asked already), learning rate, average, report.

        On a CUDA device that happens when the gradients of the next step are asked for, so that the device never waits
        for the host; and at once where a line of the log, a checkpoint or a picture needs it.

        Raises:
            TrainingDivergedError: too many steps with a loss or gradient that is not finite.
        """
        if self._open is None:
            return
        step, self._open = self._open, None
        loss, norm, mine, *norms = step.numbers.read()
        scaled = self.parallel.mixed_precision == "fp16"  # then an infinite gradient is the loss scaler's business
        skip = self.guard.check(step.number, loss, 0.0 if scaled else norm, lambda: self._evidence(step, mine, norms))
        if skip and step.taken:
            uncount_step(self.optimizer)
        elif not skip and step.total:
            if not step.taken:
                self.optimizer.step()
            self.scheduler.step()
            if self.ema is not None:
                self.ema.update(self.objective)
        images = sum(len(batch.keys) for batch in step.batches)
        self.report.step(loss, norm, images=images * self.parallel.world_size)

    def losses(self, batch: Batch, first: int) -> Tensor:
        """Loss of every image (B,): encode images, encode prompts, draw noise and timesteps, predict.

        Args:
            batch: on the device.
            first: how many images the run has seen before this batch's first.
        """
        with self.parallel.autocast():
            latents = self.encode_images(batch)
            embeds, mask = self.encode_prompts(batch)
            draws = draw(range(first, first + len(latents)), latents.shape[1:], self.noise).to(latents.device)
            return self.wrapped(latents, draws, embeds, mask, batch.captions)

    @torch.no_grad()
    def encode_images(self, batch: Batch) -> Tensor:
        """Scaled latents (B, C, h, w) fp32: cached ones, or those of the autoencoder."""
        if batch.latents is not None:
            return batch.latents.float()
        autoencoder = self.networks.autoencoder
        assert autoencoder is not None and batch.images is not None
        images = normalise_images(batch.images)
        return autoencoder.encode(fit_to_factor(images, autoencoder.downsample_factor)).float()

    def encode_prompts(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Text features (B, L, C) and mask (B, L); none where the text encoder is trained: it gets the captions."""
        if self.extra.train_text_encoder:
            return None, None
        if batch.prompt_embeds is not None:
            return batch.prompt_embeds, batch.prompt_mask
        return embed_captions(self.networks.text_encoder, batch.captions)

    def _evidence(self, step: _OpenStep, loss: float, norms: Sequence[float]) -> Evidence:
        """What a bundle about a step that is not finite is made of: the last micro-batch, and a search through it.

        The weights are still those of the step: it was left out, and no later one has been taken.
        """
        batches = step.batches
        batch = batches[-1].to(self.parallel.device)
        latents = self.encode_images(batch)
        embeds, mask = self.encode_prompts(batch)
        first = step.samples + ((len(batches) - 1) * self.parallel.world_size + self.parallel.rank) * len(latents)
        draws = draw(range(first, first + len(latents)), latents.shape[1:], self.noise).to(latents.device)
        tensors = {"latents": latents, "noise": draws.noise, "index": draws.index}
        return Evidence(
            keys=[key for each in batches for key in each.keys],
            captions=[caption for each in batches for caption in each.captions],
            tensors=tensors if embeds is None else {**tensors, "prompt_embeds": embeds},
            find_layer=lambda: first_nonfinite_layer(self.objective, latents, draws, embeds, mask, batch.captions),
            parameters=self.objective.named_parameters(),
            gradient_norms=dict(zip(self._trained, norms, strict=True)) if norms else {},
            local_loss=loss,
        )

    @property
    def epochs(self) -> int:
        """Epochs that are complete."""
        return self.data.epoch + (self.data.batches_left == 0)

    def _build_optimizer(self) -> None:
        train, accumulation = self.config.train, self.config.train.gradient_accumulation_steps
        self.total_steps = self.extra.max_steps or max(train.num_epochs * self.data.len_epoch // accumulation, 1)
        effective = train.train_batch_size * accumulation * self.parallel.world_size
        ratio, options = auto_scale_lr(effective, train.optimizer, **(train.auto_lr or {"base_batch_size": effective}))
        if train.use_fsdp and (refusal := fsdp_refusal(options["type"])):
            raise ConfigError(refusal)
        self.optimizer = self.parallel.prepare_optimizer(
            build_optimizer(self.objective.named_parameters(), options, name_scales=train.lr_scale)
        )
        self.scheduler = build_lr_scheduler(
            self.optimizer, train.lr_schedule, train.lr_schedule_args, total_steps=self.total_steps,
            lr_scale_ratio=ratio,
        )  # fmt: skip

    def _check_agreement(self) -> None:
        """Raises DataError unless all processes see the same data."""
        seen = self.parallel.gather(self.data.fingerprint)
        if len(set(seen)) > 1:
            other = next(rank for rank, value in enumerate(seen) if value != seen[0])
            raise DataError(
                f"process {other} sees other data than process 0 in {self.config.data.data_dir}: give every machine "
                "the same files."
            )
