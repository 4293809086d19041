"""The configs of 2048 and 4096 px: tables, networks and one training step, against diffusers where it has them."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from sana.config import load_config
from sana.data.aspect_ratio import ASPECT_RATIOS
from sana.diffusion import SAMPLERS
from sana.models import TRANSFORMERS, build_transformer, transformer_arguments
from sana.models.autoencoder.dc_ae import DCAEConfig
from sana.models.text_encoder.tiny import random_gemma2
from sana.models.transformer.position import sincos_table
from sana.models.transformer.sana import SanaMS
from sana.training import random_encoders
from sana.training.trainer import Trainer
from tests.models.transformer.networks import small
from tests.tolerance import assert_rms_close
from tests.training.conftest import SHAPE

ROOT = Path(__file__).parents[1]
YAMLS = sorted(path for size in (2048, 4096) for path in ROOT.glob(f"configs/sana_config/{size}ms/*.yaml"))
TINY = {"hidden_size": 32, "num_heads": 4, "depth": 1, "caption_channels": 12, "model_max_length": 10}


def by_name(path: Path) -> str:
    return path.stem


def tiny(path: Path, **changes: object) -> SanaMS:
    """The network of a YAML at a small width, with random weights everywhere."""
    return small(SanaMS, **{**transformer_arguments(load_config(path)), **TINY, **changes})


def inputs(size: tuple[int, int], channels: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, channels, *size, generator=generator)
    return latents, torch.tensor([603.0]), torch.randn(1, 1, 10, 12, generator=generator)


def test_both_sizes_are_there():
    assert {load_config(path).model.image_size for path in YAMLS} == {2048, 4096}


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
@pytest.mark.parametrize("shape", [(1.0, 1.0), (0.75, 1.25), (1.5, 0.5)])
def test_the_table_of_positions_is_that_of_diffusers(path, shape):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    model = load_config(path).model
    base = model.image_size // 32
    grid = (int(shape[0] * base), int(shape[1] * base))
    expected = embeddings.get_2d_sincos_pos_embed(
        64, grid, base_size=base, interpolation_scale=model.pe_interpolation, output_type="pt"
    )
    assert model.use_pe and base == {2048: 64, 4096: 128}[model.image_size]
    table = sincos_table(64, grid, model.pe_interpolation, base)
    torch.testing.assert_close(table[0], expected.float(), rtol=0, atol=2e-5)  # theirs has float32 frequencies
    # The full width of a picture is `base / pe_interpolation` positions, whatever its number of tokens.
    finest = table[0, grid[1] - 1, :1].double()
    assert math.sin((grid[1] - 1) / grid[1] * base / model.pe_interpolation) == pytest.approx(float(finest), abs=1e-4)


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
@pytest.mark.parametrize("part", [(1, 1), (1, 2)], ids=["square", "wide"])
@torch.no_grad()
def test_the_network_at_its_full_size_is_that_of_diffusers(path, part):
    pytest.importorskip("diffusers")
    from tools.bench.networks import diffusers_transformer

    network = tiny(path)
    side = network.architecture.input_size
    latents, timestep, text = inputs((side // part[0], side // part[1]))
    theirs = diffusers_transformer(network)
    expected = theirs(latents, text[:, 0], timestep, return_dict=False)[0]
    assert_rms_close(network(latents, timestep, text), expected)
    changed = tiny(path, pe_interpolation=0.5)
    assert not torch.allclose(changed(latents, timestep, text), expected, atol=1e-3)  # positions matter to it


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
@torch.no_grad()
def test_the_official_network_builds_with_its_table(path):
    with torch.device("meta"):
        network = build_transformer(load_config(path))
    side = load_config(path).model.image_size // 32
    assert network.pos_embed.shape == (1, side**2, 2240) and network.architecture.input_size == side


@pytest.mark.parametrize(("name", "patch"), [("SanaMS_600M_P2_D28", 2), ("SanaMS_600M_P4_D28", 4),
                                             ("SanaMS_1600M_P2_D20", 2)])  # fmt: skip
@torch.no_grad()
def test_networks_of_larger_patches_at_4096_pixels(name, patch):
    """Latents of a factor-8 autoencoder would need them: fewer tokens than latent pixels, and a table of those."""
    options = transformer_arguments(load_config(YAMLS[-1])) | TINY
    with torch.device("meta"):
        assert TRANSFORMERS[name](**{**options, "hidden_size": 64}).architecture.patch_size == patch
    network = tiny(YAMLS[-1], patch_size=patch)
    latents, timestep, text = inputs((128, 96))
    out = network(latents, timestep, text)
    assert network.position_embedding(network._grid(latents)).shape == (1, 128 * 96 // patch**2, 32)
    assert out.shape == latents.shape and torch.isfinite(out).all()
    moved = network(latents.roll(patch, 3), timestep, text)
    assert not torch.allclose(moved, out.roll(patch, 3), atol=1e-3)  # it knows where a patch is


def test_buckets_are_those_of_diffusers():
    pipelines = pytest.importorskip("diffusers.pipelines.sana.pipeline_sana")
    for size in (2048, 4096):
        theirs = getattr(pipelines, f"ASPECT_RATIO_{size}_BIN")
        theirs = {ratio: tuple(int(side) for side in sides) for ratio, sides in theirs.items()}
        assert ASPECT_RATIOS[f"ASPECT_RATIO_{size}"] == theirs
        # the official table for inference at 2048 px leaves the longest shapes out
        assert ASPECT_RATIOS[f"ASPECT_RATIO_{size}_TEST"].items() <= theirs.items()
    assert len(ASPECT_RATIOS["ASPECT_RATIO_4096_TEST"]) == 40 and len(ASPECT_RATIOS["ASPECT_RATIO_2048_TEST"]) == 33


@pytest.mark.parametrize("size", [2048, 4096])
@pytest.mark.parametrize("kind", ["", "_TEST"])
def test_buckets_are_sound(size, kind):
    table = ASPECT_RATIOS[f"ASPECT_RATIO_{size}{kind}"]
    ratios = [height / width for height, width in table.values()]
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)
    for written, (height, width) in table.items():
        assert float(written) == pytest.approx(height / width, abs=0.005 + 1e-9)
        assert height % 32 == width % 32 == 0
        assert height * width == pytest.approx(size**2, rel=0.12)
        assert table.get(f"{width / height:.2f}", (width, height)) == (width, height) or height != width
    assert table["1.0"] == (size, size)


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
def test_the_flow_shift_of_a_yaml_decides_the_steps(path):
    config = load_config(path)
    shift = {2048: 3.0, 4096: 6.0}[config.model.image_size]
    assert config.scheduler.flow_shift == shift
    times = SAMPLERS["flow_euler"].times(4, flow_shift=config.scheduler.flow_shift)
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(torch.as_tensor(times).float(), scheduler.sigmas.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "path", [YAMLS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in YAMLS[1:])], ids=by_name
)
def test_a_training_step_in_a_bucket_of_the_full_size(path, tmp_path, monkeypatch):
    widths = (4, 4, 8, 8, 16, 32)
    shape = {"latent_channels": 32, "encoder_width_list": widths, "decoder_width_list": widths}
    monkeypatch.setitem(random_encoders.DCAE_PRESETS, "dc-ae-f32c32-sana-1.1", DCAEConfig(**SHAPE | shape))
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    monkeypatch.setattr(random_encoders, "random_gemma2", partial(random_gemma2, **text))
    options = [
        f"--data.data_dir=[{ROOT / 'asset/example_data_tar'}]", "--train.extra={random_encoders: true, max_steps: 1}",
        "--model.model=SanaMS_Tiny_P1", "--model.extra={depth: 1, hidden_size: 32, num_heads: 2}",
        "--text_encoder.caption_channels=16", "--model.mixed_precision=fp32", "--train.train_batch_size=1",
        "--train.num_workers=0", "--train.visualize=false", "--report_to=none", f"--work_dir={tmp_path}",
        "--train.log_interval=1", "--train.lr_schedule_args={num_warmup_steps: 0}",
    ]  # fmt: skip
    config = load_config(path, options)
    trainer = Trainer(config)
    before = trainer.networks.transformer.final_layer.linear.weight.detach().clone()
    seen = []
    trainer.networks.transformer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    trainer.train()
    buckets = ASPECT_RATIOS[config.model.aspect_ratio_type].values()
    assert seen and {(1, 32, height // 32, width // 32) for height, width in buckets} >= set(seen)
    loss = json.loads((tmp_path / "train_log.jsonl").read_text().splitlines()[0])["loss"]
    assert math.isfinite(loss) and not torch.equal(before, trainer.networks.transformer.final_layer.linear.weight)
