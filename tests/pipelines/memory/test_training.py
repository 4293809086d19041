"""Predicted memory of training steps against what PyTorch's allocator reports, within a tenth."""

from dataclasses import replace

import pytest

from sana.config import ConfigError, load_config
from sana.diffusion import flow
from sana.pipelines.memory.training import CHECKPOINTING, TrainingMemory
from tools.measure_training_memory import row

TINY = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
SMALL = "configs/sana_config/512ms/Sana_600M_img512.yaml"
FROZEN = "--train.extra.train_text_encoder=false"


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_steps_with_a_text_encoder_that_learns(checkpointing) -> None:
    assert row(TINY, [], 4, checkpointing).ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("batch", "overrides"),
    [
        (8, [FROZEN, "--model.mixed_precision=fp32", "--train.optimizer={type: CAMEWrapper, lr: 1e-4}"]),
        (4, [FROZEN, "--train.ema_update=false", "--train.optimizer={type: AdamW, lr: 1e-4}"]),
        (2, [FROZEN, "--train.gradient_accumulation_steps=3", "--train.optimizer={type: Lion, lr: 1e-4}"]),
    ],
)
def test_steps_of_the_transformer_alone(batch, overrides) -> None:
    assert row(TINY, overrides, batch, "none").ratio == pytest.approx(1, abs=0.05)


def test_states_are_four_times_the_parameters_with_adamw_and_an_average() -> None:
    config = load_config(SMALL, ["--train.optimizer={type: AdamW, lr: 1e-4}", "--train.ema_update=true"])
    memory = TrainingMemory(config, device="cpu")
    states, parameters = memory.states(), memory.gradients()
    assert states.ema == parameters
    assert 2 * parameters <= states.optimizer < 2 * parameters + 4096
    assert parameters <= states.weights < 1.01 * parameters  # tables that are not trained
    assert states.total == sum((states.weights, states.optimizer, states.ema, states.autoencoder, states.text_encoder))


def test_cached_features_leave_the_encoders_out() -> None:
    cached = ["--data.load_vae_feat=true", "--data.load_text_feat=true", "--train.visualize=false"]
    memory = TrainingMemory(load_config(SMALL, cached), device="cuda")
    states = memory.states()
    assert (states.autoencoder, states.text_encoder) == (0, 0)
    assert (memory.encode_images(2), memory.encode_texts(2)) == (0, 0)


def test_what_is_computed_again_is_not_held() -> None:
    memory = TrainingMemory(load_config(TINY, [FROZEN]), device="cuda")
    none, ffn, blocks = (memory.forward_backward(8, one) for one in CHECKPOINTING)
    assert memory.gradients() / 2 < blocks < ffn < none
    assert memory.forward_backward(16, "blocks") > blocks


def test_nothing_without_numbers_is_kept_for_the_process() -> None:
    before = flow._sigmas_on.cache_info()
    config = load_config(TINY, [FROZEN])
    TrainingMemory(replace(config, model=replace(config.model, use_pe=True)), device="cpu").forward_backward(1)
    assert flow._sigmas_on.cache_info() == before


def test_what_is_not_predicted_is_refused() -> None:
    with pytest.raises(ConfigError, match="The memory of shards"):
        TrainingMemory(load_config(TINY, ["--train.use_fsdp=true"]), device="cuda")
    with pytest.raises(ValueError, match="for cpu or cuda, not 'mps'"):
        TrainingMemory(load_config(TINY), device="mps")
    with pytest.raises(ValueError, match="one of none, ffn, blocks, not 'all'"):
        TrainingMemory(load_config(TINY), device="cpu").forward_backward(1, "all")
