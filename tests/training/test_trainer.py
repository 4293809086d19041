"""The trainer on a tiny configuration: it runs, resumes, exports what loads, and refuses what it cannot do."""

import math

import pytest
import torch

from sana.config import ConfigError
from sana.models.transformer.sana import SanaMS
from sana.models.weights import load_weights, read_metadata
from sana.training.ema import ExponentialMovingAverage
from sana.training.train_state import load_train_state
from sana.training.trainer import Trainer


def test_a_run_trains_exports_and_resumes(tiny_config, tmp_path):
    trainer = Trainer(tiny_config)
    before = trainer.transformer.final_layer.linear.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.transformer.final_layer.linear.weight)
    metadata = read_metadata(tmp_path / "run/model/model.safetensors")
    assert metadata.chi_prompt == ["Draw this picture.", ""] and metadata.flow_shift == 2.0
    assert metadata.config["vae"]["vae_pretrained"] == "vae"
    assert metadata.config["text_encoder"]["text_encoder_name"] == "text_encoder"
    model = SanaMS(**metadata.arch["kwargs"])
    load_weights(model, tmp_path / "run/model/model.safetensors")
    average = trainer.ema.average["transformer.final_layer.linear.weight"]
    torch.testing.assert_close(model.final_layer.linear.weight, average.bfloat16().float())
    live = trainer.module.state_dict()["transformer.final_layer.linear.weight"]
    resumed = Trainer(tiny_config)
    assert resumed.progress.step == 4
    assert torch.equal(resumed.transformer.final_layer.linear.weight, live)


def test_load_from_starts_from_given_weights(tiny_config, tmp_path):
    first = Trainer(tiny_config)
    torch.nn.init.constant_(first.transformer.final_layer.linear.bias, 0.25)
    first.ema = ExponentialMovingAverage(first.module)
    first.export(tmp_path / "model")
    tiny_config.model.load_from = str(tmp_path / "model/model.safetensors")
    second = Trainer(tiny_config)
    assert (second.transformer.final_layer.linear.bias == 0.25).all()
    assert second.progress.step == 0


def test_repeated_steps_on_a_fixed_pool_lower_the_loss(tiny_config):
    tiny_config.train.extra = {"steps": 60, "pool_size": 8, "refresh": 0, "muon_lr": 3e-3, "adamw_lr": 3e-3}
    trainer = Trainer(tiny_config)
    losses = [trainer.train_step(step / 200).item() for step in range(50)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_sigmas_are_logit_normal_then_shifted(tiny_config):
    trainer = Trainer(tiny_config)
    sigma = trainer._draw_sigma(200_000).double()
    unshifted = sigma / (2 - sigma)  # inverse of 2 u / (1 + u)
    logit = torch.logit(unshifted)
    assert abs(logit.mean()) < 0.01 and abs(logit.std() - 1) < 0.01


def test_other_data_and_unknown_options_are_refused(tiny_config):
    tiny_config.train.extra = {"stepz": 3}
    with pytest.raises(ConfigError, match="stepz"):
        Trainer(tiny_config)
    tiny_config.data.type = "SanaWebDatasetMS"
    with pytest.raises(ConfigError, match=r"data\.type"):
        Trainer(tiny_config)


def test_saving_leaves_the_live_weights_alone(tiny_config, tmp_path):
    trainer = Trainer(tiny_config)
    trainer.train_step(0.0)
    hooks = [p.expand_as(p).grad_fn.next_functions[0][0] for p in trainer.module.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    trainer.save()
    assert all(torch.equal(before[name], p) for name, p in trainer.module.named_parameters())
    after = [p.expand_as(p).grad_fn.next_functions[0][0] for p in trainer.module.parameters() if p.requires_grad]
    assert hooks == after  # casting the live model would give new ones, and DDP would wait for gradients for ever
    assert load_train_state(tmp_path / "run/state.pt")["step"] == 1
