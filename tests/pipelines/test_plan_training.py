"""Batch size and recomputation of a training run, against hand arithmetic."""

from typing import Any

import pytest

from sana.config import SanaConfig
from sana.pipelines.plan_search import MemoryLimitError
from sana.pipelines.plan_stages import Stage
from sana.pipelines.plan_training import TrainingPlan, TrainingRequest, make_training_plan

G = 10**9
ACTIVATIONS = {"none": 3.0, "ffn": 2.0, "blocks": 0.5}  # G bytes an image


class StandIn:
    """10 G of states, and activations that are linear in the batch; encoding takes 4 G above the states."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def stages(self, batch: int, checkpointing: str) -> tuple[Stage, ...]:
        self.asked.append((batch, checkpointing))
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
