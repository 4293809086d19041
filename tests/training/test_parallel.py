"""Several processes train what one trains: DDP, FSDP2, other numbers of processes on the way, failing ones."""

import itertools
import json

import pytest
import torch

from sana.models.autoencoder.dc_ae import DCAE, DCAEConfig
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.training.checkpoint_folder import CheckpointIndex, latest_checkpoint
from sana.training.scene_latents import SceneBatches
from tests.training.distributed_runs import PICTURES, Command, descendants, launcher, run_options, torchrun
from tests.training.run_results import assert_same, logged, state

CLOSE = {"rtol": 1e-4, "atol": 2e-6}  # fp32, after a few steps whose sums are taken in another order


@pytest.fixture(scope="module")
def options(tmp_path_factory, text_folder, vae_folder):
    folder = tmp_path_factory.mktemp("parallel") / "pictures"
    # a large eps: where a gradient is rounding noise, AdamW would otherwise make full steps of it
    steady = ["--train.optimizer={type: AdamW, lr: 1.0e-2, eps: 1.0e-2}", "--data.extra.order=sequential"]
    steady += ["--train.save_model_steps=2"]
    return [*run_options(folder, text_folder, vae_folder), *steady]


@pytest.fixture(scope="module")
def ends(options, tmp_path_factory):
    """What runs of one and of two processes leave behind, by name."""
    folder = tmp_path_factory.mktemp("runs")
    fsdp = "--train.use_fsdp=true"

    def command(name, *more):
        return [*options, f"--work_dir={folder / name}", *more]

    two = launcher().start(
        folder,
        command("ddp"),
        command("fsdp", fsdp),
        command("broken_fsdp", fsdp, "--train.extra.max_steps=2"),
        command("broken_fsdp", fsdp),
        command("fewer", fsdp, "--train.extra.max_steps=2"),
        world_size=2,
    )
    one = launcher().start(folder, command("one", "--train.train_batch_size=4"))
    two.finish()
    one.finish()
    launcher().start(folder, command("fewer", fsdp, "--train.train_batch_size=4")).finish()
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def exported(folder):
    return state(folder)["model"]


def world_size(folder):
    return CheckpointIndex.read(latest_checkpoint(folder / "checkpoints")).world_size


def test_two_processes_equal_one_with_batches_twice_as_large(ends):
    assert (world_size(ends["ddp"]), world_size(ends["one"])) == (2, 1)
    first, second = state(ends["ddp"]), state(ends["one"])
    assert_same(first["model"], second["model"], **CLOSE)
    for part in ("module", "ema"):
        assert_same(first["shared.pt"][part], second["shared.pt"][part], **CLOSE)
    losses = [[record["loss"] for record in run["log"]] for run in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


def test_averaged_weights_are_exported_and_differ_from_the_trained_ones(ends):
    """Or the comparisons of exported weights would say little."""
    end = state(ends["ddp"])
    name = "final_layer.linear.weight"
    average, trained = end["shared.pt"]["ema"], end["shared.pt"]["module"]
    assert_same(end["model"][name], average[f"transformer.{name}"])
    assert (average[f"transformer.{name}"] - trained[f"transformer.{name}"]).abs().max() > 1e-4


def test_sharded_processes_equal_copying_ones(ends):
    assert_same(exported(ends["fsdp"]), exported(ends["ddp"]), **CLOSE)
    assert state(ends["fsdp"])["log"][-1]["grad_norm"] == pytest.approx(
        state(ends["ddp"])["log"][-1]["grad_norm"], rel=1e-4
    )


def test_a_sharded_run_resumes_exactly(ends):
    first, second = state(ends["fsdp"]), state(ends["broken_fsdp"])
    assert_same(first, second)


def test_a_sharded_run_of_two_processes_goes_on_in_one(ends):
    assert world_size(ends["fewer"]) == 1
    assert_same(exported(ends["fewer"]), exported(ends["fsdp"]), **CLOSE)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_no_sample_is_seen_twice_in_an_epoch_though_the_number_of_processes_changes(options, tmp_path, before, after):
    keys = str(tmp_path / "keys")
    options = [
        *options, f"--work_dir={tmp_path / 'run'}", "--train.gradient_accumulation_steps=1",
        "--data.extra.order=shuffled",
    ]  # fmt: skip
    steps = 2 // before  # four images
    launcher().start(
        tmp_path, [*options, f"--train.extra.max_steps={steps}"], world_size=before, keys=f"{keys}_before"
    ).finish()
    steps += (PICTURES - 4) // (2 * after)
    more = [*options, f"--train.extra.max_steps={steps}"]
    launcher().start(tmp_path, more, world_size=after, keys=f"{keys}_after").finish()
    lines = [[json.loads(line) for line in path.open()] for path in sorted(tmp_path.glob("keys_*.jsonl"))]
    assert len(lines) == before + after and {epoch for rank in lines for epoch, _ in rank} == {0}
    seen = list(itertools.chain.from_iterable(keys for rank in lines for _, keys in rank))
    assert len(seen) == len(set(seen)) == PICTURES


def test_processes_that_see_other_data_stop_with_a_sentence(options, tmp_path, image_folder):
    other = {"1": [f"--data.data_dir=[{image_folder}]"]}
    run = launcher().start(tmp_path, [*options, f"--work_dir={tmp_path / 'run'}"], world_size=2, rank_options=other)
    assert run.wait() == [1, 1]
    for output in run.output:
        assert "error: process 1 sees other data than process 0" in output.read_text()
        assert "Traceback" not in output.read_text()


@pytest.mark.parametrize("sharding", ["false", "true"])
def test_a_process_that_fails_takes_the_others_along(options, tmp_path, sharding):
    run = launcher().start(
        tmp_path, [*options, f"--work_dir={tmp_path / 'run'}", f"--train.use_fsdp={sharding}"], world_size=2,
        fail=[1, 2],
    )  # fmt: skip
    codes = run.wait()
    assert codes[1] == 1 and codes[0] != 0
    assert latest_checkpoint(tmp_path / "run/checkpoints").name == "step_00000002"


@pytest.mark.slow
def test_torchrun_ends_when_a_process_fails_and_leaves_none_behind(options, tmp_path):
    job = {"commands": [[*options, f"--work_dir={tmp_path / 'run'}", "--train.extra.max_steps=100000"]], "fail": [1, 2]}
    with Command(torchrun("tests/training/distributed_runs.py", json.dumps(job)), tmp_path / "output.txt") as run:
        assert run.wait() == 1
        assert "told to fail" in run.text
        assert not descendants(run.process.pid)
    assert latest_checkpoint(tmp_path / "run/checkpoints").name == "step_00000002"


@pytest.mark.parametrize("sharding", ["false", "true"])
def test_a_picture_that_is_not_finite_on_one_process_skips_the_step_on_all(options, tmp_path, sharding):
    """Shards are computed with by all processes or none, also where only one has something to look for."""
    options = [*options, f"--work_dir={tmp_path / 'run'}", f"--train.use_fsdp={sharding}"]
    launcher().start(tmp_path, options, world_size=2, poison=[1, 1]).finish()
    assert [record["loss"] is None for record in logged(tmp_path / "run")] == [False, True, False, False]
    report = json.loads((tmp_path / "run/nonfinite/step_00000001_rank1/report.json").read_text())
    assert report["first_bad_layer"] == "inputs" and report["world_size"] == 2


@pytest.mark.slow
def test_sharded_text_encoders_train_and_are_validated_and_exported(options, tmp_path):
    """Captions are dropped on one process and not on the other; pictures need every process."""
    joint = [
        *options, "--data.type=DrawnScenes", "--data.data_dir=[]", "--model.image_size=256",
        "--model.class_dropout_prob=0", "--train.extra.train_text_encoder=true", "--train.extra.max_steps=2",
        "--train.extra.null_caption_probability=0.3", "--train.extra.pool_size=8", "--train.extra.refresh=1",
        "--train.visualize=true", "--train.eval_sampling_steps=2", "--train.validation_prompts=[a red cat]",
        "--train.extra.async_save=true",
    ]  # fmt: skip
    commands = [
        [*joint, f"--work_dir={tmp_path / flag}", f"--train.use_fsdp={flag}"] for flag in ("false", "true")
    ]  # fmt: skip
    launcher().start(tmp_path, *commands, world_size=2).finish()
    for flag in ("false", "true"):
        assert (tmp_path / flag / "validation/step_00000002.png").exists()
    assert_same(exported(tmp_path / "true"), exported(tmp_path / "false"), **CLOSE)
    first, second = (SanaPipeline.from_pretrained(tmp_path / flag / "model") for flag in ("false", "true"))
    assert type(first.transformer) is type(second.transformer)
    encoders = [dict(pipeline.text_encoder.model.named_parameters()) for pipeline in (first, second)]
    assert_same(*encoders, **CLOSE)


@pytest.mark.slow
def test_a_compiled_transformer_learns_the_same(options, tmp_path):
    commands = [
        [*options, f"--work_dir={tmp_path / flag}", f"--train.extra.compile={flag}", "--train.extra.max_steps=2"]
        for flag in ("false", "true")
    ]  # fmt: skip
    launcher().start(tmp_path, *commands).finish()
    assert_same(exported(tmp_path / "true"), exported(tmp_path / "false"), **CLOSE)


def test_a_process_that_joins_draws_scenes_of_its_own(dcae_shape):
    network = DCAE(DCAEConfig(**dcae_shape)).eval()
    first = SceneBatches(network, 4, pool_size=4, refresh=1, seed=3, rank=0)
    first.next_batch()
    again, joined = (SceneBatches(network, 4, pool_size=4, refresh=1, seed=3, rank=rank) for rank in (0, 1))
    for one in (again, joined):
        one.load_state_dict(first.state_dict())
    following = [one.next_batch() for one in (first, again, joined)]
    assert torch.equal(following[0].latents, following[1].latents)
    assert not torch.equal(following[0].latents, following[2].latents)
    assert joined.epoch == first.epoch and joined.batches == first.batches
