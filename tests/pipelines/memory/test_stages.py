"""Predicted peaks against what PyTorch's allocator reports of a real run of the bundled model, within a tenth."""

import argparse
from dataclasses import replace

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.models.transformer import position
from sana.pipelines.loading import find_model, source_config
from sana.pipelines.memory.stages import MemoryModel
from tools.measure_memory import Measurement, parse_args

TINY = "asset/models/sana_tiny"


@pytest.fixture(scope="module")
def tiny():
    return source_config(find_model(TINY))


def measurement(*arguments: str) -> Measurement:
    options: argparse.Namespace = parse_args(["--model", TINY, *arguments])
    return Measurement(options)


@pytest.mark.parametrize("stage", ["text", "denoise", "decode", "encode"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bundled_model_at_its_own_size(stage, dtype) -> None:
    row = measurement("--dtype", dtype).row(stage)
    assert row.ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("stage", ["denoise", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_batch_of_another_shape(stage) -> None:
    row = measurement("--height", "256", "--width", "320", "--batch", "3").row(stage)
    assert row.ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("stage", ["decode", pytest.param("encode", marks=pytest.mark.slow)])
def test_tiles(stage) -> None:
    row = measurement("--height", "192", "--width", "256", "--tile", "96").row(stage)
    assert row.ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int8-dynamic", marks=pytest.mark.slow)])
def test_a_quantised_transformer(scheme) -> None:
    pytest.importorskip("torchao")
    row = measurement("--dtype", "bf16", "--quantization", scheme).row("denoise")
    assert row.ratio == pytest.approx(1, abs=0.1)


def test_the_same_question_has_the_same_answer(tiny) -> None:
    model = MemoryModel(tiny, device="cpu", dtype=torch.float32)
    assert model.decode(128, 128, 1) == model.decode(128, 128, 1)
    assert model.encode_text(2) == model.encode_text(2)


@pytest.mark.parametrize(("kind", "device"), [("sincos", "cpu"), ("sincos", "cuda"), ("flux_rope", "cuda")])
def test_tables_of_positions_are_counted_and_never_kept_for_the_process(tiny, kind, device) -> None:
    caches = (position.sincos_table, position.rotary_table)
    before = [cache.cache_info() for cache in caches]
    plain = MemoryModel(tiny, device=device, dtype=torch.float32).denoise(256, 256, 1)
    model = replace(tiny.model, use_pe=True, pos_embed_type=kind)
    placed = MemoryModel(replace(tiny, model=model), device=device, dtype=torch.float32).denoise(256, 256, 1)
    assert placed > plain or (device == "cpu" and placed == plain)  # there a table goes after it was added
    assert [cache.cache_info() for cache in caches] == before


def test_guidance_and_perturbation_are_branches_that_take_memory(tiny) -> None:
    model = MemoryModel(tiny, device="cuda", dtype=torch.float32)
    one, two, three = (
        model.denoise(256, 256, 1, guidance=guidance, pag=pag)
        for guidance, pag in ((False, False), (True, False), (True, True))
    )
    assert one < two < three


def test_shorter_prompts_take_less(tiny) -> None:
    model = MemoryModel(tiny, device="cpu", dtype=torch.float32)
    assert model.denoise(256, 256, 1, tokens=8) < model.denoise(256, 256, 1)
    with pytest.raises(ValueError, match="tokens must be between 1 and model_max_length 64, not 65"):
        model.denoise(256, 256, 1, tokens=65)


def test_pictures_of_a_batch_run_one_by_one_on_a_cpu_and_together_on_a_gpu(tiny) -> None:
    growth = {}
    for device in ("cpu", "cuda"):
        model = MemoryModel(tiny, device=device, dtype=torch.float32)
        growth[device] = model.decode(256, 256, 4) / model.decode(256, 256, 1)
    assert growth["cpu"] < 1.6
    assert growth["cuda"] > 2


@pytest.mark.slow
def test_a_sprint_model_is_sampled_without_a_second_branch() -> None:
    file = "configs/sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml"
    config = load_config(file, ["--model.model=SanaMSCM_600M_P1_D28"])
    taken = MemoryModel(config, device="cuda", dtype=torch.bfloat16).denoise(512, 512, 2)
    tokens = 2 * 16 * 16 * 1152 * 2  # bytes of one tensor
    assert 5 * tokens < taken < 50 * tokens


def test_a_controlnet_is_refused() -> None:
    config = load_config("configs/sana_controlnet_config/Sana_600M_img1024_controlnet.yaml")
    with pytest.raises(ConfigError, match="Pictures of the ControlNet model.model 'SanaMSControlNet_600M"):
        MemoryModel(config, device="cuda", dtype=torch.bfloat16).denoise(512, 512, 1)


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_refused(tiny, device) -> None:
    with pytest.raises(ValueError, match=f"for cpu or cuda, not '{device}'"):
        MemoryModel(tiny, device=device, dtype=torch.float32)


def test_sizes_are_multiples_of_the_factor(tiny) -> None:
    model = MemoryModel(tiny, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="must be multiples of 32 pixels, not 250 and 256"):
        model.decode(250, 256, 1)
    with pytest.raises(ValueError, match="Unknown network 'vae'; known: text_encoder"):
        model.weights("vae")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_the_bundled_model_on_a_gpu(stage) -> None:
    row = measurement("--device", "cuda", "--dtype", "bf16", "--height", "1024", "--width", "1024").row(stage)
    assert row.ratio == pytest.approx(1, abs=0.05)
