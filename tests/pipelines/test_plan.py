"""Plans as a whole: their words, what they do to a pipeline, and that nothing is loaded for them."""

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch

from sana.config import load_config
from sana.ops import packing
from sana.pipelines.plan import MemoryLimitError, Plan, PlanRequest, make_plan
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.pipelines.plan_stand_in import M, Maker, large_config

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "asset/models/sana_tiny"
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 3}


def planned(**options: Any) -> Plan:
    return make_plan(large_config(), PlanRequest(**options), make_model=Maker())


@pytest.fixture(autouse=True)
def usual_packing():
    yield
    packing.set_pack_budget(None)


def test_a_plan_says_what_by_stage_and_why():
    plan = planned(max_vram="5.5GB", batch=2)
    assert [(stage.name, stage.total // M) for stage in plan.stages] == [
        ("text encoding", 5200), ("denoising", 3400), ("decoding", 4006)
    ]  # fmt: skip
    assert (plan.peak, plan.decisive.name, plan.limit, plan.host) == (5200 * M, "text encoding", 5500 * M, 9000 * M)
    assert plan.calls == 1
    assert plan.exact
    reasons = {reason.setting: (reason.value, reason.why) for reason in plan.reasons}
    assert reasons["offload"] == ("model", "otherwise decoding needs 12.01GB")
    assert reasons["slicing"] == ("yes", "otherwise decoding needs 7.00GB")
    assert reasons["quantization"] == ("none", "exact weights fit")
    assert "packing" not in reasons


def test_the_text_is_a_table_whose_columns_end_together():
    lines = str(planned(max_vram="5.5GB")).splitlines()
    assert lines[0] == "SanaMS_600M_P1_D28: 1 picture of 1024 x 1024 px, bf16 on cuda, guidance"
    rows = lines[lines.index("") + 1 :]
    rows = rows[: rows.index("")]
    assert [row.split() for row in rows[-2:]] == [["total", "5.10", "3.20", "4.00"], ["decides"]]
    columns = [[len(row[: row.rindex(cell) + len(cell)]) for row in rows[:-1] if cell in row] for cell in ("4.00",)]
    assert columns[0] == [len(rows[0])]
    assert len({len(row) for row in rows[:-1]}) == 1, "every row ends with the last column"


def test_a_start_from_a_small_picture_is_planned():
    plan = planned(max_vram="12GB", upscale_from=512)
    assert [stage.name for stage in plan.stages] == ["text encoding", "encoding", "denoising", "decoding"]
    assert plan.settings.tile is not None and planned(max_vram="12GB").settings.tile is None
    assert "from 512 x 512 px" in plan.headline
    with pytest.raises(MemoryLimitError, match="encoding needs") as error:
        planned(max_vram="9GB", upscale_from=512, tiling="none", offload="none", quantization="none",
                text_quantization="none")  # fmt: skip
    assert error.value.stage == "encoding"
    for side, message in ((1024, "makes no picture smaller"), (0, "must be a whole number")):
        with pytest.raises(ValueError, match=message):
            planned(upscale_from=side)


def test_json_holds_bytes():
    shown = json.loads(json.dumps(planned(max_vram="3GB", batch=3).as_dict()))
    assert shown["needed"] <= shown["allowed"] == 3_000_000_000
    assert shown["stages"][0]["total"] == shown["stages"][0]["resident"] + shown["stages"][0]["peak"]
    assert shown["calls"] * shown["batch"] >= 3
    assert {one["setting"] for one in shown["settings"]} >= {"offload", "tiling", "quantization"}


def test_a_batch_that_does_not_fit_is_split_evenly():
    plan = planned(max_vram=5_800 * M, batch=10)
    assert (plan.settings.batch, plan.calls) == (5, 2)
    assert {one.setting: one.value for one in plan.reasons}["batch"] == "5, 2 calls"


def test_what_was_asked_for_is_told_apart():
    plan = planned(max_vram="12GB", offload="group", quantization="nf4")
    whys = {reason.setting: reason.why for reason in plan.reasons}
    assert whys["offload"] == whys["quantization"] == "as asked for"
    assert not plan.exact
    assert any("change" in note for note in plan.notes)


def test_notes_say_what_the_numbers_leave_out():
    assert "CUDA context" in planned().notes[-1]
    assert "malloc" in planned(device="cpu").notes[-1]


class Recorded(SimpleNamespace):
    """A pipeline that writes down what is enabled on it."""

    def __init__(self, **options: Any) -> None:
        self.done: list[tuple[Any, ...]] = []
        autoencoder = SimpleNamespace(
            enable_tiling=lambda *sizes: self.done.append(("enable_tiling", *sizes)),
            disable_tiling=lambda: self.done.append(("disable_tiling",)),
            enable_slicing=lambda: self.done.append(("enable_slicing",)),
            disable_slicing=lambda: self.done.append(("disable_slicing",)),
        )
        usual: dict[str, Any] = {
            "config": large_config(), "device": torch.device("cuda:1"), "dtype": torch.bfloat16, "transformer": None,
            "_text_encoder": None, "_autoencoder": None, "_quantization": {}, "autoencoder": autoencoder,
        }  # fmt: skip
        super().__init__(**(usual | options))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("enable_", "disable_", "quantize")):
            raise AttributeError(name)
        return lambda *arguments: self.done.append((name, *arguments))


@pytest.mark.parametrize(
    ("options", "done"),
    [
        ({}, [("disable_offload",)]),
        ({"tiling": 256}, [("disable_offload",), ("enable_tiling", 256, 256, 256, 256), ("disable_slicing",)]),
        ({"offload": "model"}, [("enable_model_cpu_offload",)]),
        ({"offload": "group"}, [("enable_group_offload",)]),
        ({"offload": "sequential"}, [("enable_sequential_cpu_offload",)]),
        ({"quantization": "int8"}, [("quantize", "int8", None), ("disable_offload",)]),
        ({"text_quantization": "nf4"}, [("quantize", None, "nf4"), ("disable_offload",)]),
        ({"batch": 2, "max_vram": "13GB"}, [("disable_offload",), ("disable_tiling",), ("enable_slicing",)]),
    ],
)  # fmt: skip
def test_apply_enables_what_the_plan_says(options: dict[str, Any], done: list[tuple[Any, ...]]):
    pipeline = Recorded()
    planned(**options).apply(pipeline)
    assert pipeline.done == done


def test_apply_forbids_the_tiles_of_a_large_picture_that_fits_whole():
    pipeline = Recorded()
    size = {"height": 4096, "width": 4096, "use_resolution_binning": False}
    planned(**size, max_vram="80GB").apply(pipeline)
    assert ("disable_tiling",) in pipeline.done


def test_a_plan_for_another_pipeline_is_refused():
    plan = planned()
    with pytest.raises(ValueError, match="for device cuda, and the pipeline is on cpu"):
        plan.apply(Recorded(device=torch.device("cpu")))
    with pytest.raises(ValueError, match="for dtype bf16, and the pipeline's is fp32"):
        plan.apply(Recorded(dtype=torch.float32))
    with pytest.raises(ValueError, match="transformer is int8 already"):
        plan.apply(Recorded(_quantization={"transformer": SimpleNamespace(scheme="int8")}))


def test_a_network_that_is_quantised_already_is_not_quantised_again():
    pipeline = Recorded(_quantization={"transformer": SimpleNamespace(scheme="int8")})
    planned(quantization="int8", text_quantization="nf4").apply(pipeline)
    assert pipeline.done[0] == ("quantize", None, "nf4")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets no tensor be read and nothing be fetched. Returns the files that were opened."""
    import transformers.modeling_utils  # noqa: F401  so that it does not keep what is put in the place of safe_open

    opened: list[str] = []
    real_open = builtins.open

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"a plan reads or fetches {arguments}")

    def watch(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(file))
        return real_open(file, *arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(builtins, "open", watch)
    return opened


def test_a_plan_opens_no_weights_and_fetches_nothing(no_weights: list[str]):
    config = load_config(ROOT / "configs/sana_config/1024ms/Sana_1600M_img1024.yaml")
    plan = make_plan(config, PlanRequest(device="cuda", dtype="bf16", max_vram="8GB"))
    assert plan.peak <= 8 * 10**9
    # 1.6 billion parameters of two bytes, and the language model's 2.6 billion: known from their papers.
    held = {name: amount for stage in plan.stages for name, amount in stage.held.items()}
    assert 3.1e9 < held["transformer"] < 3.4e9
    assert 5.1e9 < held["text_encoder"] < 5.4e9
    weights = (".safetensors", ".bin", ".pth", ".pt")
    assert [file for file in no_weights if file.endswith(weights)] == []


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """A picture of the bundled model without any setting."""
    return SanaPipeline.from_pretrained(BUNDLED, device="cpu")("a red circle", **CALL)


def fresh() -> SanaPipeline:
    return SanaPipeline.from_pretrained(BUNDLED, device="cpu")


def test_a_pipeline_is_planned_before_anything_more_is_loaded(reference: torch.Tensor):
    pipeline = fresh()
    plan = pipeline.plan(batch=2)
    assert pipeline._autoencoder is None
    assert pipeline._text_encoder is None
    assert plan.headline.startswith("SanaMS_Tiny_P1: 2 pictures of 256 x 256 px, fp32 on cpu")
    with pytest.raises(ValueError, match=r"device is 'cuda', and this pipeline's is 'cpu'"):
        pipeline.plan(device="cuda")


def test_a_plan_that_changes_nothing_makes_the_very_picture(reference: torch.Tensor):
    pipeline = fresh()
    plan = pipeline.fit("1GB")
    assert (plan.settings.tile, plan.settings.packing) == (None, True)
    assert torch.equal(pipeline("a red circle", **CALL), reference)


def test_a_tiled_picture_is_the_plain_one_within_rounding(reference: torch.Tensor):
    pipeline = fresh()
    whole = pipeline.plan(tiling="none")
    plan = pipeline.fit(whole.peak - 1, tiling="auto", text_quantization="none", quantization="none")
    assert plan.settings.tile is not None
    assert pipeline.autoencoder.tiling is not None
    assert plan.peak < whole.peak
    picture = pipeline("a red circle", **CALL)
    assert (picture - reference).square().mean().sqrt() <= 1e-5 * reference.square().mean().sqrt()


def test_without_packed_copies_the_picture_is_the_plain_one_within_rounding(reference: torch.Tensor):
    pipeline = fresh()
    plan = pipeline.fit(pipeline.plan(packing=False, tiling=128).peak + 10**6, quantization="none")
    assert not plan.settings.packing
    picture = pipeline("a red circle", **CALL)
    assert packing.pack_budget() == 0
    assert (picture - reference).square().mean().sqrt() <= 1e-4 * reference.square().mean().sqrt()


def test_a_refused_pipeline_is_unchanged():
    pipeline = fresh()
    with pytest.raises(MemoryLimitError, match="does not fit into 1.0MB"):
        pipeline.fit("1MB", tiling="none", quantization="none", text_quantization="none")
    assert pipeline._autoencoder is None
    assert pipeline._quantization == {}
    assert packing.pack_budget() > 0
