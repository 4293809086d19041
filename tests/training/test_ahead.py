"""Steps asked for before the last one is known to be good, as on a GPU: same weights, same guard, no waiting."""

import json
from dataclasses import replace

import pytest
import torch

from sana.config import load_config
from sana.data.collate import Batch
from sana.data.transforms import normalise_images
from sana.training import parallel
from sana.training.device_batches import DeviceCopies
from sana.training.nonfinite import TrainingDivergedError
from sana.training.trainer import Trainer
from tests.training.conftest import TINY_YAML
from tests.training.host_reads import HostReadError, OnDevice, put_on_device

OPTIMIZERS = ("AdamW", "CAMEWrapper", "Lion")


def trainer_of(options, *more, ahead, poison=()):
    """A trainer whose step number n in `poison` gets a picture that is not a number."""
    trainer = Trainer(load_config(TINY_YAML, [*options, "--train.log_interval=3", *more]))
    trainer.ahead = ahead
    step = trainer.train_step

    def train_step(batches):
        if trainer.step in poison:
            batches[-1] = replace(batches[-1], images=normalise_images(batches[-1].images) * float("nan"))
        step(batches)

    trainer.train_step = train_step
    return trainer


def everything(trainer):
    trainer.settle()
    state = {name: p.detach() for name, p in trainer.objective.named_parameters()}
    state |= {f"average of {name}": value for name, value in trainer.ema.average.items()}
    for name, parameter in trainer.objective.named_parameters():
        held = trainer.optimizer.state.get(parameter, {})
        state |= {f"{key} of {name}": torch.as_tensor(value) for key, value in held.items()}
    return state


def log_of(trainer):
    lines = [json.loads(line) for line in (trainer.work_dir / "train_log.jsonl").open()]
    return [{key: line[key] for key in ("step", "epoch", "loss", "lr", "grad_norm", "skipped")} for line in lines]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_running_ahead_changes_no_bit_also_over_steps_that_are_skipped(image_options, tmp_path, name):
    options = [
        *image_options, "--train.extra.max_steps=7", "--train.save_model_steps=4",
        "--train.gradient_accumulation_steps=1",
        f"--train.optimizer={{type: {name}, lr: 1.0e-3, weight_decay: 0.1}}", "--train.lr_schedule=cosine",
        "--train.lr_schedule_args={num_warmup_steps: 3}",
    ]  # fmt: skip
    runs = []
    for ahead in (False, True):
        trainer = trainer_of(options, f"--work_dir={tmp_path / str(ahead)}", ahead=ahead, poison=(1, 4))
        trainer.train()
        assert (trainer.step, trainer.guard.count, trainer.scheduler.last_epoch) == (7, 2, 5)
        runs.append(trainer)
    assert_equal(everything(runs[0]), everything(runs[1]))
    assert log_of(runs[0]) == log_of(runs[1])
    reports = [
        {path.parent.name: json.loads(path.read_text()) for path in run.work_dir.glob("nonfinite/*/report.json")}
        for run in runs
    ]
    assert reports[0].keys() == {"step_00000001", "step_00000004"}
    for number, report in reports[0].items():
        for key in ("keys", "captions", "first_bad_layer", "first_bad_gradient", "skipped"):
            assert report[key] == reports[1][number][key], (number, key)


def test_a_checkpoint_between_two_steps_holds_the_last_one(image_options, tmp_path):
    whole = trainer_of(image_options, f"--work_dir={tmp_path / 'whole'}", ahead=True)
    whole.train()
    first = trainer_of(image_options, "--train.save_model_steps=2", ahead=True)
    first.total_steps = 2
    first.train()
    second = trainer_of(image_options, ahead=True)
    assert second.step == 2
    second.train()
    assert_equal(everything(whole), everything(second))
    assert log_of(whole)[-1] == log_of(second)[-1]


def test_the_run_stops_one_step_later_with_the_weights_before_the_bad_one(image_options):
    trainer = trainer_of(image_options, "--train.extra.nonfinite_budget=0", ahead=True, poison=(1,))
    batches = [[trainer.data.next_batch()] for _ in range(3)]
    keys = batches[1][0].keys
    trainer.train_step(batches[0])
    before = {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}
    trainer.train_step(batches[1])
    assert trainer.guard.count == 0  # nobody has looked
    with pytest.raises(TrainingDivergedError, match="step 1 is not finite"):
        trainer.train_step(batches[2])
    assert_equal(before, {name: p.detach() for name, p in trainer.objective.named_parameters()})
    (report,) = (trainer.work_dir / "nonfinite").glob("*/report.json")
    assert json.loads(report.read_text())["keys"] == keys


def test_an_optimiser_that_cannot_skip_waits(image_options):
    trainer = trainer_of(image_options, ahead=True, poison=(0,))
    trainer.optimizer = torch.optim.SGD(trainer.objective.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}
    trainer.train_step([trainer.data.next_batch()])
    assert trainer.guard.count == 1
    assert_equal(before, {name: p.detach() for name, p in trainer.objective.named_parameters()})


def features(trainer, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[0, 3:] = 0
    return Batch(
        keys=list("abcd"), captions=["a red cat"] * 4, weights=torch.ones(4), epoch=0,
        latents=torch.randn(4, 4, 2, 2, generator=generator), prompt_embeds=torch.randn(4, 6, 16, generator=generator),
        prompt_mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*OPTIMIZERS, "CAME8BitWrapper", "Muon"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_reads_from_the_device(image_options, monkeypatch, name, accumulation):
    original = parallel.Parallel.prepare
    monkeypatch.setattr(
        parallel.Parallel, "prepare", lambda self, module, parts=(): original(self, put_on_device(module), parts)
    )
    more = [f"--train.optimizer={{type: {name}, lr: 1.0e-3}}", "--train.log_interval=50", "--train.extra.max_steps=9"]
    trainer = trainer_of(image_options, *more, ahead=True)
    monkeypatch.setattr(type(trainer.networks.transformer), "_trim", staticmethod(lambda y, mask: (y, mask)))
    trainer.copies = lambda batch: batch._with({key: OnDevice(value) for key, value in batch._tensors()})
    before = trainer.networks.transformer.final_layer.linear.weight.inner.clone()
    for step in range(3):
        trainer.train_step([features(trainer, step)] * accumulation)
    assert not torch.equal(before, trainer.networks.transformer.final_layer.linear.weight.inner)
    assert trainer.ema.updates == 2 and trainer.guard.count == 0  # the third is not settled
    assert isinstance(trainer.ema.average["transformer.final_layer.linear.weight"], OnDevice)
    trainer.settle()
    assert trainer.ema.updates == 3 and len(trainer.report.losses) == 3


def test_the_stand_in_notices_reads():
    tensor = OnDevice(torch.ones(3))
    reads = (
        lambda: float(tensor.sum()), lambda: tensor.sum().item(), lambda: bool(tensor.all()), lambda: tensor.nonzero(),
        lambda: tensor[tensor > 0], lambda: tensor.tolist(), lambda: torch.equal(tensor, tensor),
    )  # fmt: skip
    for read in reads:
        with pytest.raises(HostReadError):
            read()
    with pytest.raises(HostReadError):
        torch.zeros(3).copy_(tensor)
    assert torch.equal(torch.zeros(3).copy_(tensor + 1, non_blocking=True), torch.full((3,), 2.0))


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_batches_are_copied_on_a_stream_of_their_own(monkeypatch):
    log = []
    copying, computing = FakeStream(log, "copying"), FakeStream(log, "computing")
    active = [computing]

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            active.append(self.stream)

        def __exit__(self, *_):
            active.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: active[-1])
    monkeypatch.setattr(Batch, "to", lambda self, device: log.append(f"copied on {active[-1].name}") or self)
    monkeypatch.setattr(Batch, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    copies = DeviceCopies(torch.device("cuda"))
    batch = Batch(["a"], ["a cat"], torch.ones(1), 0, latents=torch.zeros(1, 4, 2, 2))
    assert copies(batch) is batch
    assert log == ["copied on copying", "computing waits for copying", "kept for computing"]
    assert active == [computing]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_waits_for_the_device(image_options, name):
    more = [f"--train.optimizer={{type: {name}, lr: 1.0e-3}}", "--train.log_interval=50", "--train.extra.max_steps=9"]
    trainer = trainer_of(image_options, *more, ahead=True)
    batches = [features(trainer, step).pin_memory() for step in range(5)]
    for batch in batches[:2]:  # the first steps compile, allocate and fill tables
        trainer.train_step([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[2:]:
            trainer.train_step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert trainer.guard.count == 0 and len(trainer.report.losses) == 5
