"""Batch size and recomputation of a training run, against hand arithmetic."""

from pathlib import Path
from typing import Any

import pytest

from sana.config import SanaConfig, load_config
from sana.pipelines.plan_search import MemoryLimitError
from sana.pipelines.plan_stages import Stage
from sana.pipelines.plan_training import TrainingPlan, TrainingRequest, make_training_plan

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


def official() -> SanaConfig:
    return load_config(ROOT / "configs/sana_config/512ms/Sana_600M_img512.yaml")


def test_states_of_the_released_recipe_are_those_of_its_parameters():
    """0.6 billion parameters in float32: weights, gradients and an average are each 4 bytes of every one."""
    found = official()
    found.train.optimizer = {"type": "AdamW", "lr": 1e-4}
    found.train.ema_update = True
    plan = make_training_plan(found, TrainingRequest(batch=2, checkpointing="blocks"))
    held = plan.decisive.held
    assert 0.58e9 < held["weights"] / 4 < 0.62e9
    assert held["gradients"] == pytest.approx(held["weights"], rel=0.01)
    assert held["optimizer"] == pytest.approx(2 * held["weights"], rel=0.01)
    assert held["moving average"] == pytest.approx(held["weights"], rel=0.01)
    assert held["autoencoder"] > 10**9
    assert held["text encoder"] > 5 * 10**9


def test_cached_features_need_no_encoders():
    found = official()
    found.data.load_vae_feat = found.data.load_text_feat = True
    found.train.visualize = False
    plan = make_training_plan(found, TrainingRequest(batch=1))
    assert [stage.name for stage in plan.stages] == ["forward, backward", "optimizer step"]
    assert not {"autoencoder", "text encoder"} & set(plan.stages[0].held)


def test_fewer_images_fit_where_more_do_not():
    found = load_config(ROOT / "configs/sana_config/tiny/Sana_tiny_img256.yaml")
    found.train.train_batch_size, found.train.gradient_accumulation_steps = 7, 2
    free = make_training_plan(found, TrainingRequest(batch=6, checkpointing="none"))
    plan = make_training_plan(found, TrainingRequest(max_vram=free.peak, checkpointing="none"))
    assert (plan.batch, plan.accumulation) == (6, 3)
    plan = make_training_plan(found, TrainingRequest(max_vram=free.peak - 1, checkpointing="none"))
    assert (plan.batch, plan.accumulation) == (5, 3), "a byte less"
    assert make_training_plan(found, TrainingRequest(batch=6, max_vram=free.peak - 1)).checkpointing != "none"
