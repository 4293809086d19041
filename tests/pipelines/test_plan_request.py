"""Amounts of memory as text, and the checks of a request by itself and against a config."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sana.pipelines.plan_request import PlanRequest, check_scheme, format_memory, make_job, parse_memory, with_size
from tests.pipelines.plan_stand_in import large_config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8GB", 8_000_000_000), ("8 GiB", 8 * 2**30), ("7.5gb", 7_500_000_000), ("512MB", 512_000_000),
        ("512 mib", 512 * 2**20), ("1kB", 1000), ("2TB", 2 * 10**12), ("100B", 100), (12345, 12345), (0, 0),
        ("0.29GB", 290_000_000), (".5GB", 500_000_000), ("4.1GB", 4_100_000_000),
    ],
)  # fmt: skip
def test_parse_memory(text: int | str, number: int):
    assert parse_memory("max_vram", text) == number


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8", "no unit; write 8GB"), ("8 ", "no unit; write 8GB"), ("", "such as 8GB"), ("GB", "such as 8GB"),
        ("eight GB", "such as 8GB"), ("8XB", "unknown unit"), ("8Gb/s", "such as 8GB"), ("-8GB", "such as 8GB"),
        ("1e9B", "such as 8GB"), ("8,5GB", "such as 8GB"), (-1, "not be negative"), (True, "such as 8GB"),
        (None, "such as 8GB"), (8.5, "such as 8GB"), ("nanGB", "such as 8GB"),
    ],
)  # fmt: skip
def test_nonsense_is_no_amount_of_memory(text: Any, told: str):
    with pytest.raises(ValueError, match=told):
        parse_memory("max_vram", text)


@given(st.integers(0, 10**13))
def test_an_amount_that_was_rounded_up_is_enough(amount: int):
    assert 0 <= parse_memory("it", format_memory(amount, up=True)) - amount <= max(10**7, amount // 10**6)
    assert abs(parse_memory("it", format_memory(amount)) - amount) <= max(5 * 10**6, amount // 10**6)


def test_format_memory():
    assert [format_memory(one) for one in (8_004_000_000, 99_949_999, 0)] == ["8.00GB", "99.9MB", "0.0MB"]
    assert format_memory(8_000_000_001, up=True) == "8.01GB"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 0}, "batch must be a whole number from 1"),
        ({"batch": True}, "batch must be"),
        ({"device": "cuda:1"}, "Unknown device 'cuda:1'. Did you mean 'cuda'"),
        ({"device": "gpu"}, "Allowed: cpu, cuda"),
        ({"dtype": "fp8"}, "Unknown dtype"),
        ({"offload": "modell"}, "Did you mean 'model'"),
        ({"offload": "group", "device": "cpu"}, "no effect with device cpu"),
        ({"packing": False}, "no effect with device cuda"),
        ({"packing": "often", "device": "cpu"}, "packing must be"),
        ({"quantization": "int9"}, "Did you mean 'int8'"),
        ({"text_quantization": "q4"}, "Unknown text_quantization"),
        ({"quantization": "int4", "device": "cpu"}, "does not run on cpu"),
        ({"quantization": "fp8", "device": "cpu"}, "does not run on cpu; these do: int8"),
        ({"text_quantization": "int8", "text_encoder": False}, "without the text encoder"),
        ({"tiling": 16}, "at least 64"),
        ({"tiling": "512px"}, "tiling must be"),
        ({"tiling": True}, "tiling must be"),
        ({"max_vram": "8"}, "max_vram 8 has no unit"),
        ({"max_vram": 0}, "leaves nothing"),
        ({"max_vram": "1GB", "margin": "1GB"}, "margin 1GB leaves nothing of max_vram 1GB"),
        ({"margin": "1GB"}, "no max_vram was given"),
    ],
)
def test_a_request_is_checked_at_once(options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        PlanRequest(**options)


def test_packing_that_is_switched_off_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sana.pipelines.plan_request.pack_budget", lambda: 0)
    with pytest.raises(ValueError, match=r"set_pack_budget\(0\)"):
        PlanRequest(device="cpu", packing=True)
    assert not make_job(large_config(), PlanRequest(device="cpu")).packing


def test_limit_is_what_the_margin_leaves():
    assert PlanRequest(max_vram="8GB", margin="500MB").limit == 7_500_000_000
    assert PlanRequest().limit is None


def test_sizes_are_those_that_the_pipeline_makes():
    config = large_config()
    size = make_job(config, PlanRequest(height=1000, width=1000)).size
    assert (size.height, size.width, size.model_height, size.model_width) == (1000, 1000, 1024, 1024)
    assert make_job(config, PlanRequest()).size.model_width == 1024
    with pytest.raises(ValueError, match="height 1000 is not a multiple of 32"):
        make_job(config, PlanRequest(height=1000, use_resolution_binning=False))
    with pytest.raises(ValueError, match="width must be a whole number of pixels from 32"):
        make_job(config, PlanRequest(width=0))


def test_with_size_leaves_binning_aside():
    job = with_size(make_job(large_config(), PlanRequest(height=1000)), 512, 256)
    assert (job.size.model_height, job.size.model_width, job.size.binned) == (512, 256, False)


def test_dtypes_are_those_of_the_pipeline():
    config = large_config()
    assert make_job(config, PlanRequest(device="cpu")).dtype == torch.float32
    assert make_job(config, PlanRequest(device="cuda")).dtype == torch.bfloat16
    assert make_job(config, PlanRequest(device="cuda", dtype="fp16")).dtype == torch.float16


@pytest.mark.parametrize("options", [{"guidance": True}, {"pag": True}])
def test_a_sprint_model_has_no_guidance(options: dict[str, Any]):
    config = large_config()
    config.model.model = "SanaMSCM_1600M_P1_D20"
    assert make_job(config, PlanRequest()).guidance is False
    with pytest.raises(ValueError, match="no effect with a Sprint model"):
        make_job(config, PlanRequest(**options))


def test_what_the_model_cannot_do_is_refused():
    config = large_config()
    with pytest.raises(ValueError, match="no multiple of 32"):
        make_job(config, PlanRequest(tiling=100))
    config.model.attn_type = "vanilla"
    with pytest.raises(ValueError, match="pag needs attn_type linear"):
        make_job(config, PlanRequest(pag=True))
    config.model.model = "SanaMSControlNet_600M_P1_D28"
    with pytest.raises(ValueError, match="no plan for it"):
        make_job(config, PlanRequest())


def test_embeddings_in_a_file_need_no_text_encoder():
    config = large_config()
    assert make_job(config, PlanRequest()).text_encoder
    assert not make_job(config, PlanRequest(text_encoder=False)).text_encoder
    config.text_encoder.text_encoder_name = "prompts.safetensors"
    assert not make_job(config, PlanRequest()).text_encoder
    with pytest.raises(ValueError, match="reads embeddings from a file"):
        make_job(config, PlanRequest(text_quantization="int8"))


def test_check_scheme_accepts_what_runs():
    check_scheme("quantization", "nf4", "cpu")
    check_scheme("quantization", "fp8", "cuda")
