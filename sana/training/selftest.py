"""The promises of training, measured on this machine with a user's own configuration before a long run.

Nothing of the run is touched: all is done in a temporary folder. The command is tools/selftest.py.
"""

import gc
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sana.config import ConfigError, SanaConfig
from sana.config_extra import train_extra
from sana.data.collate import Batch
from sana.models.text_encoder.chi import count_dropped_tokens
from sana.training import run_state
from sana.training.parallel import Parallel
from sana.training.selftest_measures import (
    chunks,
    digest,
    distance,
    existing,
    gradients,
    harmless,
    joined,
    local,
    local_weights,
    part,
    peak_bytes,
)
from sana.training.trainer import Trainer

FEW = 8  # images of a batch that is trained on again and again
FALLING_STEPS = 10
MOST_STEPS = 20  # of the measurement of speed
LEAST_STEPS = 3
SAMPLES = 32
SAME = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}  # relative RMS of two gradients that mathematics says are equal
SAME_UPDATE = {"fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}  # of two updates on a GPU, whose sums have no fixed order
GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    Attributes:
        name: of the check.
        status: "ok", "failed" or "skipped".
        detail: what was measured, what is wrong, or why it was skipped.
        numbers: the measured values by name.
    """

    name: str
    status: str
    detail: str
    numbers: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class CheckFailedError(RuntimeError):
    """A check found that a promise does not hold; the message says which."""


class CheckSkipped(Exception):  # noqa: N818  no error: there is nothing to check
    """A check does not apply here; the message says why."""


Found = tuple[str, dict[str, float]]


def run_selftest(
    config: SanaConfig, *, minutes: float = 0.25, scratch: str | Path | None = None, only: Sequence[str] = (),
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Checks the promises of training for a configuration. Under torchrun every process must call it.

    Args:
        config: as for a run; its work_dir is not touched.
        minutes: the speed is measured for about as long (but for 3 to 20 steps).
        scratch: an existing folder for temporary files, shared by all machines; None: the system's.
        only: names of checks (`CHECKS`); empty: all.
        on_outcome: called after every check, on every process.

    Returns:
        What was found, the same on every process.

    Raises:
        ConfigError: the configuration asks for what cannot be done.
    """
    if unknown := sorted(set(only) - set(CHECKS)):
        raise ConfigError(f"There is no check {unknown[0]!r}; there are {', '.join(CHECKS)}.")
    parallel = Parallel(config.model.mixed_precision, use_fsdp=config.train.use_fsdp)
    folder = Path(parallel.gather(tempfile.mkdtemp(dir=scratch, prefix="selftest_") if parallel.is_main else None)[0])
    try:
        test = SelfTest(config, folder, minutes)
        outcomes = []
        for name, check in CHECKS.items():
            if only and name not in only and name != "build":
                continue
            outcomes.append(_merge(name, parallel.gather(_run(name, check, test))))
            on_outcome(outcomes[-1])
        test.close()
        parallel.barrier()
        return outcomes
    finally:
        if parallel.is_main:
            shutil.rmtree(folder, ignore_errors=True)


class SelfTest:
    """A trainer in a temporary folder, and one method for each check. The order of `CHECKS` matters.

    Args:
        config: of the user.
        folder: temporary.
        minutes: of the measurement of speed.
    """

    def __init__(self, config: SanaConfig, folder: Path, minutes: float) -> None:
        self.user, self.minutes = config, minutes
        self.config = harmless(config, folder)
        self.running: Trainer | None = None
        self.batch: Batch | None = None  # a few images

    @property
    def trainer(self) -> Trainer:
        if self.running is None:
            raise CheckSkipped("the run could not be built")
        return self.running

    def close(self) -> None:
        """Frees the trainer: another one may need its memory."""
        if self.running is not None:
            self.running.data.close()
        self.running = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def build(self) -> Found:
        """Networks, data, optimiser and weights of the configuration can be had."""
        started = time.monotonic()
        self.running = Trainer(self.config)
        count = sum(parameter.numel() for parameter in self.trainer.objective.parameters())
        place = f"{self.trainer.parallel.world_size} x {self.trainer.parallel.device.type}"
        numbers = {"parameters": count, "seconds": time.monotonic() - started}
        return f"{count / 1e6:.1f} M parameters are trained on {place} in {self.config.model.mixed_precision}", numbers

    def data(self) -> Found:
        """Random samples can be read; what they look like."""
        needed = max(1, math.ceil(SAMPLES / self.config.train.train_batch_size))
        batches = [self.trainer.data.next_batch() for _ in range(needed)]
        self.batch = part(batches[0], 0, FEW)
        broken = [key for b in batches for key, weight in zip(b.keys, b.weights.tolist(), strict=True) if not weight]
        keys = {key for batch in batches for key in batch.keys}
        if broken:
            raise CheckFailedError(
                f"{len(set(broken))} of {len(keys)} random samples cannot be read, the first is {broken[0]}: "
                "tools/data_check.py lists all"
            )
        shapes = {tuple((b.images if b.images is not None else b.latents).shape[-2:]) for b in batches}
        captions = [caption for batch in batches for caption in batch.captions]
        numbers = {"samples": len(keys), "sizes": len(shapes), "cut_captions": float(self._cut(captions))}
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(shapes)[:4])
        words = max(len(caption.split()) for caption in captions)
        return (
            f"{len(keys)} samples read, sizes {sizes}; longest caption {words} words, {numbers['cut_captions']:.0f} "
            f"of {len(captions)} are cut to {self.config.text_encoder.model_max_length} tokens",
            numbers,
        )

    def accumulation(self) -> Found:
        """Two micro-batches of B give the loss and the gradient of one batch of 2 B, over all processes."""
        batch, parallel = self._few(), self.trainer.parallel
        whole = joined(batch, batch) if len(batch) == 1 else part(batch, 0, len(batch) // 2 * 2)
        everyones = parallel.gather(whole.to("cpu"))
        mine = [chunks(everyones)[number * parallel.world_size + parallel.rank] for number in range(2)]
        return self._compare(gradients(self.trainer, [whole]), gradients(self.trainer, mine))

    def checkpointing(self) -> Found:
        """Gradient checkpointing changes neither the loss nor the gradient."""
        transformer: Any = self.trainer.networks.transformer
        results = []
        before = transformer.gradient_checkpointing
        try:
            for transformer.gradient_checkpointing in (False, True):
                results.append(gradients(self.trainer, [self._few()]))
        finally:
            transformer.gradient_checkpointing = before
        return self._compare(*results)

    def ema(self) -> Found:
        """After a step the average is d a + (1 - d) w with the weights w after it."""
        trainer = self.trainer
        if trainer.ema is None:
            raise CheckSkipped("train.ema_update is false")
        before = {name: value.clone() for name, value in trainer.ema.average.items()}
        updates = trainer.ema.updates + 1
        trainer.train_step([self._few()])
        trainer.settle()
        if trainer.guard.count:
            raise CheckFailedError("the loss or its gradient is not finite: the step was skipped")
        decay = min(self.config.train.ema_rate, (1 + updates) / (10 + updates))
        weights = dict(trainer.objective.named_parameters())
        wrong = moved = size = 0.0
        for name, old in before.items():
            new, average = weights[name].detach().float(), trainer.ema.average[name]
            old, new, average = (local(value).double() for value in (old, new, average))
            wrong += (average - (decay * old + (1 - decay) * new)).square().sum().item()
            moved += ((1 - decay) * (new - old)).square().sum().item()
            size += new.square().sum().item()
        error = math.sqrt(wrong) / max(math.sqrt(moved), 1e-30)
        numbers = {"relative_error": error, "decay": decay}
        if math.sqrt(wrong) > 0.02 * math.sqrt(moved) + 1e-7 * math.sqrt(size):
            raise CheckFailedError(f"the average is off by {error:.1e} of what it should have moved")
        return f"decay {decay:.4f}; off by {error:.0e} of the movement", numbers

    def loss(self) -> Found:
        """The loss on one batch with one noise is finite and falls."""
        trainer, losses = self.trainer, []
        before = trainer.samples
        for _ in range(FALLING_STEPS):
            trainer.samples = 0  # the position in the run decides the noise
            trainer.train_step([self._few()])
            trainer.settle()
            losses.append(trainer.report.losses[-1])
        trainer.samples = before
        numbers = {"first": losses[0], "last": losses[-1]}
        if not all(math.isfinite(loss) for loss in losses):
            raise CheckFailedError(f"the loss is not finite: {', '.join(f'{loss:.4g}' for loss in losses)}")
        if losses[-1] >= losses[0]:
            raise CheckFailedError(
                f"the loss on one batch went from {losses[0]:.4f} to {losses[-1]:.4f} in {FALLING_STEPS} steps; "
                "look at train.optimizer.lr"
            )
        return f"{losses[0]:.4f} to {losses[-1]:.4f} in {FALLING_STEPS} steps on one batch", numbers

    def processes(self) -> Found:
        """All processes see the same data set and hold the same weights after the steps above."""
        parallel = self.trainer.parallel
        if parallel.world_size == 1:
            raise CheckSkipped("there is one process; start this with torchrun to check several")
        seen = parallel.gather((self.trainer.data.fingerprint, digest(self.trainer)))
        for rank, (data, weights) in enumerate(seen):
            for what, differs in (("data", data != seen[0][0]), ("weights", weights != seen[0][1])):
                if differs:
                    raise CheckFailedError(f"process {rank} has other {what} than process 0")
        return f"{parallel.world_size} processes hold the same data set and weights", {"processes": len(seen)}

    def speed(self) -> Found:
        """Images a second with the full batch, peak memory, and how long the whole run takes."""
        trainer, parallel = self.trainer, self.trainer.parallel
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._full_step()  # compiles, allocates
        trainer.settle()
        started, steps, elapsed = time.monotonic(), 0, 0.0
        while steps < LEAST_STEPS or (elapsed < self.minutes * 60 and steps < MOST_STEPS):
            self._full_step()
            steps += 1
            (elapsed,) = parallel.max(time.monotonic() - started)
        trainer.settle()  # a device may be a step behind
        (elapsed,) = parallel.max(time.monotonic() - started)
        train = self.config.train
        images = train.train_batch_size * train.gradient_accumulation_steps * parallel.world_size * steps / elapsed
        (memory,) = parallel.max(peak_bytes() / GIB)
        hours = trainer.total_steps * elapsed / steps / 3600
        numbers = {"images_per_second": images, "seconds_per_step": elapsed / steps, "peak_gib": memory, "hours": hours}
        limit = f", stopped at {train.early_stop_hours:g} h" if hours > train.early_stop_hours else ""
        kind = "GPU" if torch.cuda.is_available() else "main"
        told = f"{images:.3g} images/s, {elapsed / steps:.3g} s a step, peak {memory:.2f} GiB of {kind} memory"
        return f"{told}; {trainer.total_steps} steps: {hours:.3g} h{limit}", numbers

    def checkpoint(self) -> Found:
        """A checkpoint can be written and read back, and there is room for those that the run keeps."""
        trainer, started = self.trainer, time.monotonic()
        run_state.save(trainer)
        trainer.checkpoints.wait()
        trainer.parallel.barrier()
        seconds = time.monotonic() - started
        path = trainer.checkpoints.folder / f"step_{trainer.step:08d}"
        loaded = trainer.checkpoints.load(path)  # compares the contents with their checksums
        for name, value in loaded.shared.get("module", {}).items():
            if not torch.equal(value.cpu(), trainer.objective.state_dict()[name].cpu()):
                raise CheckFailedError(f"{name} was read back with other values than were written")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        extra = train_extra(self.user.train.extra)
        count = extra.keep_last + 1 + (trainer.total_steps // extra.keep_every if extra.keep_every else 0)
        place = existing(Path(self.user.work_dir))
        free = shutil.disk_usage(place).free
        numbers = {"bytes": size, "seconds": seconds, "needed_bytes": count * size, "free_bytes": free}
        told = f"{count} checkpoints of {size / GIB:.3g} GiB need {count * size / GIB:.3g} GiB"
        if count * size > free:
            raise CheckFailedError(f"{told}, and {place} has {free / GIB:.3g} GiB: lower train.extra.keep_last")
        if not os.access(place, os.W_OK):
            raise CheckFailedError(f"{place}, where work_dir is to be, cannot be written")
        return f"written and read back in {time.monotonic() - started:.1f} s; {told} of {free / GIB:.0f} free", numbers

    def resume(self) -> Found:
        """A run that is saved, ended and started again makes the step that it would have made."""
        self._next_step()  # the optimiser has a state
        step = self.trainer.step
        run_state.save(self.trainer)
        self.trainer.checkpoints.wait()
        self.trainer.parallel.barrier()
        start = local_weights(self.trainer)
        expected = self._next_step()
        self.close()
        self.running = Trainer(self.config)
        if self.trainer.step != step:
            raise CheckFailedError(f"the run goes on at step {self.trainer.step}, and was saved at {step}")
        found = self._next_step()
        if found[0] != expected[0]:
            raise CheckFailedError(f"the next batch is {found[0][:2]}..., and would have been {expected[0][:2]}...")
        bitwise = all(torch.equal(expected[1][name], value) for name, value in found[1].items())
        update = {name: expected[1][name] - value for name, value in start.items()}
        error = distance(update, {name: found[1][name] - value for name, value in start.items()})
        on_cpu = self.trainer.parallel.device.type == "cpu"
        allowed = 0.0 if on_cpu else SAME_UPDATE[self.config.model.mixed_precision]
        if not bitwise and not error <= allowed:
            wanted = "must be bitwise equal on a CPU" if on_cpu else f"allowed is {allowed:.0e}"
            raise CheckFailedError(f"the step after resuming differs by {error:.1e} of the update; {wanted}")
        how = "bitwise equal" if bitwise else f"not bitwise, equal within {error:.1e} of the update ({allowed:.0e})"
        return f"the same next batch, and weights that are {how}", {"bitwise": float(bitwise), "difference": error}

    def _few(self) -> Batch:
        if self.batch is None:
            self.batch = part(self.trainer.data.next_batch(), 0, FEW)
        return self.batch

    def _full_step(self) -> None:
        count = self.config.train.gradient_accumulation_steps
        self.trainer.train_step([self.trainer.data.next_batch() for _ in range(count)])

    def _next_step(self) -> tuple[list[str], dict[str, torch.Tensor]]:
        batch = self.trainer.data.next_batch()
        self.trainer.train_step([part(batch, 0, FEW)])
        self.trainer.settle()
        return [*batch.keys, *batch.captions], local_weights(self.trainer)

    def _compare(self, first: Any, second: Any) -> Found:
        allowed = SAME[self.config.model.mixed_precision]
        if first is None or second is None:
            raise CheckFailedError("the loss or its gradient is not finite")
        loss = abs(first.loss - second.loss) / max(abs(first.loss), 1e-30)
        norm = abs(first.norm - second.norm) / max(first.norm, 1e-30)
        error = max(distance(first.gradients, second.gradients), norm)
        told = f"loss differs by {loss:.0e}, gradient by {error:.0e} ({allowed:.0e} is allowed)"
        if not (loss <= allowed and error <= allowed):
            raise CheckFailedError(told)
        return told, {"loss_difference": loss, "gradient_difference": error}

    def _cut(self, captions: list[str]) -> int:
        tokenizer = getattr(self.trainer.networks.text_encoder, "tokenizer", None)
        if tokenizer is None:
            return 0
        chi, length = self.config.text_encoder.chi_prompt, self.config.text_encoder.model_max_length
        dropped = [
            count_dropped_tokens(tokenizer, caption, chi_prompt=chi, model_max_length=length) for caption in captions
        ]
        return sum(count > 0 for count in dropped)


CHECKS: dict[str, Callable[[SelfTest], Found]] = {
    name: getattr(SelfTest, name)
    for name in (
        "build", "data", "accumulation", "checkpointing", "ema", "loss", "processes", "speed", "checkpoint", "resume",
    )
}  # fmt: skip


def _run(name: str, check: Callable[[SelfTest], Found], test: SelfTest) -> Outcome:
    """One check on this process. Errors that nobody foresaw go on with their traceback."""
    try:
        return Outcome(name, "ok", *check(test))
    except CheckSkipped as reason:
        return Outcome(name, "skipped", str(reason))
    except (RuntimeError, OSError, MemoryError) as error:  # data, weights, memory, disk
        return Outcome(name, "failed", " ".join(str(error).split()) or type(error).__name__)


def _merge(name: str, found: list[Outcome]) -> Outcome:
    """The worst of what the processes found, with its process."""
    for status in ("failed", "skipped"):
        for rank, outcome in enumerate(found):
            if outcome.status == status:
                place = f"process {rank}: " if len(found) > 1 and status == "failed" else ""
                return Outcome(name, status, f"{place}{outcome.detail}", outcome.numbers)
    return found[0]
