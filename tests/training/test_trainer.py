"""The trainer on tiny networks: what a step computes, exact resumption, what it exports, what it refuses."""

import json
import math

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.models.weights import CheckpointError, read_metadata
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.training.nonfinite import TrainingDivergedError
from sana.training.trainer import Trainer
from tests.training.conftest import TINY_YAML


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def config_of(options, *more):
    return load_config(TINY_YAML, [*options, *more])


def test_a_run_leaves_checkpoints_a_log_and_a_model_that_the_pipeline_reads(tiny_config, tmp_path):
    trainer = Trainer(tiny_config)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(
        before["transformer.final_layer.linear.weight"], trainer.networks.transformer.final_layer.linear.weight
    )
    lines = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    metadata = read_metadata(tmp_path / "run/model/model.safetensors")
    assert metadata.chi_prompt == ["Draw this picture.", ""] and metadata.flow_shift == 4.0
    for folder in ("model", "checkpoints/step_00000004"):
        pipeline = SanaPipeline.from_pretrained(tmp_path / "run" / folder)
        average = trainer.ema.average["transformer.final_layer.linear.weight"]
        assert torch.equal(pipeline.transformer.final_layer.linear.weight, average)
        trained = trainer.ema.average["captions.model.norm.weight"]
        assert torch.equal(pipeline.text_encoder.model.norm.weight, trained)
        assert pipeline("a red cat", height=64, width=64, num_inference_steps=1, progress_bar=False).shape[0] == 1


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_bitwise_equal(image_options, tmp_path, stop):
    whole = Trainer(config_of(image_options, f"--work_dir={tmp_path / 'whole'}"))
    whole.train()
    # the same run, stopped in the middle of the schedule
    broken = Trainer(config_of(image_options, f"--train.save_model_steps={stop}"))
    broken.total_steps = stop
    broken.train()
    resumed = Trainer(config_of(image_options))
    assert resumed.step == stop
    resumed.train()
    assert_equal(weights(whole), weights(resumed))
    assert_equal(whole.ema.average, resumed.ema.average)
    logs = [[json.loads(line) for line in (tmp_path / run / "train_log.jsonl").open()] for run in ("whole", "run")]
    for first, second in zip(*logs, strict=True):
        assert [first[key] for key in ("step", "loss", "lr", "grad_norm", "epoch")] == [
            second[key] for key in ("step", "loss", "lr", "grad_norm", "epoch")
        ]


def test_drawn_scenes_and_a_trained_text_encoder_resume_as_well(tiny_options, tmp_path):
    whole = Trainer(config_of(tiny_options, f"--work_dir={tmp_path / 'whole'}"))
    whole.train()
    broken = Trainer(config_of(tiny_options, "--train.save_model_steps=2"))
    broken.total_steps = 2
    broken.train()
    resumed = Trainer(config_of(tiny_options))
    resumed.train()
    assert_equal(weights(whole), weights(resumed))


def test_micro_batches_together_are_one_batch(image_options, tmp_path):
    """Four batches of 2 and one of 8 give the same update; SGD-like: AdamW's first step shows only signs."""
    options = [*image_options, "--train.extra.max_steps=1", "--data.extra.order=sequential"]
    updates = []
    for size, micro in ((8, 1), (2, 4)):
        sizes = [f"--train.train_batch_size={size}", f"--train.gradient_accumulation_steps={micro}"]
        trainer = Trainer(config_of(options, f"--work_dir={tmp_path / str(size)}", *sizes))
        trainer.optimizer = torch.optim.SGD(trainer.objective.parameters(), lr=1.0)
        trainer.train_step([trainer.data.next_batch() for _ in range(micro)])
        updates.append(weights(trainer))
    for name in updates[0]:
        torch.testing.assert_close(updates[0][name], updates[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_changes_nothing(image_options, tmp_path):
    results = []
    for on in ("true", "false"):
        trainer = Trainer(config_of(image_options, f"--work_dir={tmp_path / on}", f"--train.grad_checkpointing={on}"))
        trainer.train()
        results.append(weights(trainer))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_a_broken_sample_does_not_count(image_options):
    trainer = Trainer(config_of(image_options, "--train.log_interval=50"))
    batch = trainer.data.next_batch()
    clean, dirty = (
        batch,
        type(batch)(**{**vars(batch), "images": batch.images.clone(), "weights": torch.tensor([1.0, 1, 1, 0])}),
    )
    dirty.images[3] = 191
    trainer.optimizer = torch.optim.SGD(trainer.objective.parameters(), lr=0.0)
    losses = [trainer.losses(each, 0) for each in (clean, dirty)]
    assert torch.equal(losses[0][:3], losses[1][:3]) and losses[0][3] != losses[1][3]
    trainer.train_step([dirty])
    assert trainer.report.losses[-1] == pytest.approx(losses[1][:3].mean().item(), rel=1e-6)


def test_a_step_that_is_not_finite_is_skipped_then_the_run_stops_with_evidence(image_options, tmp_path):
    trainer = Trainer(config_of(image_options, "--train.extra.nonfinite_budget=1"))
    batches = [trainer.data.next_batch()]
    trainer.train_step(batches)
    before, average = weights(trainer), {k: v.clone() for k, v in trainer.ema.average.items()}
    bad = trainer.networks.transformer.blocks[0].attn.proj
    hook = bad.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    trainer.train_step(batches)
    assert_equal(before, weights(trainer))
    assert_equal(average, trainer.ema.average)
    assert trainer.guard.count == 1
    with pytest.raises(TrainingDivergedError, match="nonfinite"):
        trainer.train_step(batches)
    hook.remove()
    (report,) = [
        json.loads(path.read_text()) for path in (tmp_path / "run/nonfinite").glob("step_00000002*/report.json")
    ]
    assert report["keys"] == batches[0].keys
    assert "blocks.0.attn.proj" in report["first_bad_layer"]


def test_load_from_starts_from_given_weights_and_a_fresh_state(tiny_options, tmp_path):
    first = Trainer(config_of(tiny_options))
    first.train()
    second = Trainer(
        config_of(
            tiny_options,
            f"--work_dir={tmp_path / 'other'}",
            f"--model.load_from={tmp_path}/run/model/model.safetensors",
        )
    )
    assert second.step == 0
    started = dict(second.networks.transformer.named_parameters())
    for name, value in first.ema.average.items():
        if name.startswith("transformer."):
            assert torch.equal(started[name.removeprefix("transformer.")], value)


def test_repeated_steps_on_few_pictures_lower_the_loss(image_options):
    options = [
        "--train.extra.max_steps=60", "--train.gradient_accumulation_steps=1",
        "--train.optimizer={type: AdamW, lr: 3.0e-3}", "--train.log_interval=12",
        "--train.save_model_steps=1000", "--train.save_model_epochs=1000",
    ]  # fmt: skip
    trainer = Trainer(config_of(image_options, *options))
    trainer.train()
    losses = [json.loads(line)["loss"] for line in (trainer.work_dir / "train_log.jsonl").open()]
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--train.extra.stepz=3", "stepz"),
        ("--data.type=SanaImgDatset", "SanaImgDataset"),
        ("--model.model=SanaMSCM_600M_P1_D28", "SanaMSCM"),
        ("--model.mixed_precision=fp16", "fp16"),
        ("--train.optimizer={type: Adamm, lr: 1.0e-4}", "AdamW"),
        ("--train.gradient_accumulation_steps=0", "1 or more"),
        ("--data.extra.remainder=drp", "drop"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tiny_options, override, sentence):
    if "fp16" in override and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 works")
    with pytest.raises(ValueError, match=sentence):
        Trainer(config_of(tiny_options, override))


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tiny_options):
    Trainer(config_of(tiny_options)).train()
    with pytest.raises(CheckpointError, match="depth"):
        Trainer(config_of(tiny_options, "--model.extra={depth: 2, hidden_size: 32, num_heads: 2}"))
    with pytest.raises(CheckpointError, match="Lion"):
        Trainer(config_of(tiny_options, "--train.optimizer={type: Lion, lr: 1.0e-4}"))


def test_resume_from_nowhere_is_told(tiny_options, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Trainer(config_of(tiny_options, f"--resume_from={tmp_path / 'nowhere'}"))


def test_validation_shows_the_averaged_weights_and_disturbs_nothing(image_options, tmp_path):
    plain = Trainer(config_of(image_options, f"--work_dir={tmp_path / 'plain'}"))
    plain.train()
    shown = [
        "--train.visualize=true", "--train.eval_sampling_steps=2", "--train.validation_prompts=[a red cat, two owls]",
        "--report_to=tensorboard",
    ]  # fmt: skip
    watched = Trainer(config_of(image_options, *shown))
    watched.train()
    assert_equal(weights(plain), weights(watched))
    sheets = sorted(path.name for path in (tmp_path / "run/validation").iterdir())
    assert sheets == ["step_00000002.png", "step_00000004.png"]
    assert list((tmp_path / "run/tensorboard").rglob("events*"))


def test_the_official_file_is_written_on_request_and_goes_on(image_options, tmp_path):
    first = Trainer(config_of(image_options, "--train.extra.save_pth=true", "--train.extra.keep_last=1"))
    first.train()
    (path,) = (tmp_path / "run/checkpoints").glob("epoch_*_step_4.pth")
    content = torch.load(path, weights_only=True)
    assert {"state_dict", "state_dict_ema", "optimizer", "scheduler", "epoch", "rng_state"} <= content.keys()
    second = Trainer(config_of(image_options, f"--work_dir={tmp_path / 'other'}", f"--resume_from={path}"))
    assert second.step == 4
    assert_equal(weights(first), weights(second))
    assert_equal(first.ema.average, second.ema.average)
    state = [trainer.optimizer.state_dict()["state"] for trainer in (first, second)]
    assert state[0].keys() == state[1].keys() and all(torch.equal(state[0][0][k], state[1][0][k]) for k in state[0][0])


def test_averaging_may_be_switched_on_and_off_on_the_way(image_options):
    def run(steps, averaging):
        trainer = Trainer(
            config_of(image_options, f"--train.extra.max_steps={steps}", f"--train.ema_update={averaging}")
        )
        before = weights(trainer)
        if trainer.ema is not None and trainer.ema.updates == 0:
            assert_equal(trainer.ema.average, before)
        trainer.train()
        return trainer

    run(1, "false")
    assert run(2, "true").ema.updates == 1
    assert run(3, "false").step == 3
