"""Batch size and recomputation of a training run, against hand arithmetic."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sana.config import SanaConfig, load_config
from sana.models import build_transformer
from sana.pipelines.plan_search import MemoryLimitError
from sana.pipelines.plan_stages import Stage
from sana.pipelines.plan_training import PredictedRun, TrainingPlan, TrainingRequest, greatest_batch, make_training_plan

ROOT = Path(__file__).parents[2]
G = 10**9
ACTIVATIONS = {"none": 3.0, "ffn": 2.0, "blocks": 0.5}  # G bytes an image


class StandIn:
    """10 G of states, and activations that are linear in the batch; encoding takes 4 G above the states."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, int]] = []

    def stages(self, batch: int, checkpointing: str, accumulation: int) -> tuple[Stage, ...]:
        self.asked.append((batch, checkpointing, accumulation))
        held = {"weights": 3 * G, "optimiser": 6 * G, "encoders": 1 * G}
        return (
            Stage("encoding", held, 4 * G),
            Stage("forward and backward", held, int(batch * ACTIVATIONS[checkpointing] * G)),
        )


def config() -> SanaConfig:
    found = SanaConfig()
    found.train.train_batch_size = 8
    found.train.gradient_accumulation_steps = 2
    return found


def planned(changed: SanaConfig | None = None, **options: Any) -> TrainingPlan:
    return make_training_plan(changed or config(), TrainingRequest(**options), model=StandIn())


@pytest.mark.parametrize(
    ("allowed", "batch", "way", "accumulation"),
    [
        (34, 8, "none", 2),  # 10 and 24 G
        (33, 8, "ffn", 2),
        (26, 8, "ffn", 2),
        (25, 8, "blocks", 2),
        (14, 8, "blocks", 2),  # encoding needs 14 G too
    ],
)
def test_least_recomputation_at_the_whole_batch(allowed: int, batch: int, way: str, accumulation: int):
    plan = planned(max_vram=allowed * G)
    assert (plan.batch, plan.checkpointing, plan.accumulation) == (batch, way, accumulation)
    assert plan.peak <= allowed * G


def test_then_fewer_images_and_more_micro_batches():
    changed = config()
    changed.train.train_batch_size = 20
    plan = planned(changed, max_vram=14 * G)  # blocks: 4 G for activations, so eight images
    assert (plan.batch, plan.checkpointing, plan.accumulation) == (8, "blocks", 5)
    assert plan.batch * plan.accumulation >= 20 * 2
    assert "20, the config's, need 20.00GB" in {one.setting: one.why for one in plan.reasons}["batch"]


def test_what_was_fixed_is_kept():
    assert planned(max_vram=34 * G, checkpointing="blocks").checkpointing == "blocks"
    assert planned(max_vram=34 * G, batch=4).batch == 4
    assert planned(max_vram=34 * G, batch=4).accumulation == 4
    with pytest.raises(MemoryLimitError, match="9 images a micro-batch need 14.50GB with train.grad_checkpointing"):
        planned(max_vram=14 * G, batch=9)


def test_without_a_bound_it_is_the_config():
    plan = planned()
    assert (plan.batch, plan.checkpointing, plan.limit) == (8, "none", None)
    assert plan.decisive.name == "forward and backward"
    changed = config()
    changed.train.extra = {"checkpoint_ffn": True}
    assert planned(changed).checkpointing == "ffn"
    changed = config()
    changed.train.grad_checkpointing = True
    assert planned(changed).checkpointing == "blocks"


def test_a_refusal_says_what_fits():
    with pytest.raises(MemoryLimitError) as caught:
        planned(max_vram="13GB", margin="1GB")
    assert "does not fit into 12.00GB: 1 image a micro-batch need 14.00GB" in str(caught.value)
    assert "fits with max_vram 15.00GB" in str(caught.value)
    assert planned(max_vram="15GB", margin="1GB").limit == 14 * G


def test_a_model_without_a_mix_ffn_has_nothing_of_it_to_recompute():
    changed = config()
    changed.model.ffn_type = "mlp"
    assert planned(changed, max_vram=33 * G).checkpointing == "blocks"
    with pytest.raises(ValueError, match="needs a Mix-FFN"):
        planned(changed, checkpointing="ffn")


def test_overrides_are_arguments_of_the_trainer():
    assert planned(max_vram=25 * G).overrides == (
        "--train.train_batch_size=8",
        "--train.gradient_accumulation_steps=2",
        "--train.grad_checkpointing=true",
        "--train.extra.checkpoint_ffn=false",
    )


def test_text_and_json_show_the_stages():
    plan = planned(max_vram=26 * G)
    assert "encoding" in str(plan)
    assert plan.as_dict()["gradient_accumulation_steps"] == 2
    assert plan.as_dict()["needed"] == 26 * G


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 0}, "batch must be"),
        ({"checkpointing": "block"}, "Did you mean 'blocks'"),
        ({"device": "tpu"}, "Unknown device"),
        ({"max_vram": "32"}, "no unit"),
    ],
)
def test_a_request_is_checked_at_once(options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        TrainingRequest(**options)


@given(
    high=st.integers(1, 200), base=st.integers(0, 50), slope=st.integers(1, 9), bend=st.integers(0, 3),
    limit=st.integers(0, 3000),
)  # fmt: skip
def test_the_greatest_batch_is_found_with_few_questions(high: int, base: int, slope: int, bend: int, limit: int):
    asked: set[int] = set()

    def exact(batch: int) -> int:
        return base + slope * batch + bend * (batch // 50) * batch

    def need(batch: int) -> int:
        asked.add(batch)
        return exact(batch)

    if exact(high) <= limit:
        return
    found = greatest_batch(high, limit, need)
    assert found == max((one for one in range(1, high) if exact(one) <= limit), default=0)
    assert bend or len(asked) <= 4, "where needs are linear: both ends, the answer and the one above it"


@pytest.fixture(scope="module")
def tiny() -> SanaConfig:
    """The bundled model's run, with latents and captions made ahead, seven images twice a step."""
    found = load_config(ROOT / "configs/sana_config/tiny/Sana_tiny_img256.yaml")
    found.train.train_batch_size, found.train.gradient_accumulation_steps = 7, 2
    found.train.optimizer, found.train.ema_update = {"type": "AdamW", "lr": 1e-4}, True
    found.train.extra, found.train.visualize = None, False
    found.data.load_vae_feat = found.data.load_text_feat = True
    return found


@pytest.fixture(scope="module")
def run(tiny: SanaConfig) -> PredictedRun:
    return PredictedRun(tiny, "cuda")


def test_states_are_those_of_the_parameters(tiny: SanaConfig, run: PredictedRun):
    """Weights, gradients, an average and AdamW's two moments are each 4 bytes of every parameter."""
    with torch.device("meta"):
        parameters = sum(one.numel() for one in build_transformer(tiny).parameters())
    plan = make_training_plan(tiny, TrainingRequest(), model=run)
    held = {name: amount / parameters for name, amount in plan.decisive.held.items()}
    expected = {"weights": 4, "gradients": 4, "moving average": 4, "optimizer": 8}
    assert held == pytest.approx(expected, rel=0.02)


def test_cached_features_need_no_encoders(tiny: SanaConfig, run: PredictedRun):
    cached = make_training_plan(tiny, TrainingRequest(), model=run)
    assert [stage.name for stage in cached.stages] == ["forward and backward", "optimizer step"]
    data = dataclasses.replace(tiny.data, load_vae_feat=False, load_text_feat=False)
    plan = make_training_plan(dataclasses.replace(tiny, data=data), TrainingRequest(batch=1))
    assert [stage.name for stage in plan.stages][:2] == ["encoding images", "encoding texts"]
    assert {"autoencoder", "text encoder"} <= set(plan.stages[0].held)
    assert "gradients" in plan.stages[0].held, "of the micro-batches before"


def test_fewer_images_fit_where_more_do_not(tiny: SanaConfig, run: PredictedRun):
    free = make_training_plan(tiny, TrainingRequest(batch=6, checkpointing="none"), model=run)
    plan = make_training_plan(tiny, TrainingRequest(max_vram=free.peak, checkpointing="none"), model=run)
    assert (plan.batch, plan.accumulation) == (6, 3)
    plan = make_training_plan(tiny, TrainingRequest(max_vram=free.peak - 1, checkpointing="none"), model=run)
    assert (plan.batch, plan.accumulation) == (5, 3), "a byte less"
    plan = make_training_plan(tiny, TrainingRequest(batch=6, max_vram=free.peak - 1), model=run)
    assert plan.checkpointing != "none"
