"""Options of a run that decide how the transformer computes: selective checkpointing and kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.models.transformer.sana import SanaMS
from sana.training.trainer import Trainer
from tests.training.conftest import TINY_YAML

ROOT = Path(__file__).parents[2]


def network(ffn_type="glumbconv"):
    torch.manual_seed(0)
    return SanaMS(
        depth=2, hidden_size=32, num_heads=2, patch_size=1, input_size=8, in_channels=4, caption_channels=16,
        model_max_length=6, linear_head_dim=16, class_dropout_prob=0.0, ffn_type=ffn_type,
    ).train()  # fmt: skip


def gradients(model, *, recompute):
    """Loss, gradients, and the bytes that the forward pass keeps for the backward pass."""
    for module in model.modules():
        if hasattr(module, "recompute_expansion"):
            module.recompute_expansion = recompute
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 1, 6, 16, generator=generator)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x, torch.tensor([100, 700]), text).square().mean()
    size = sum(kept.values())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("ffn_type", ["glumbconv", "glumbconv_dilate"])
def test_computing_the_expansion_again_changes_no_gradient_and_keeps_much_less(ffn_type):
    model = network(ffn_type)
    loss, expected, before = gradients(model, recompute=False)
    again, found, after = gradients(model, recompute=True)
    assert torch.equal(loss, again) and expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    hidden = int(32 * 2.5) * 2 * 64 * 2 * 4  # bytes of one wide tensor: channels, tokens, rows, float32
    assert before - after > 2 * 3 * hidden  # at least three of them in each of the two blocks


def test_nothing_is_computed_again_outside_training(monkeypatch):
    model = network().eval()
    calls = []
    monkeypatch.setattr("sana.ops.checkpoint", lambda *args, **kwargs: calls.append(args))
    for module in model.modules():
        if hasattr(module, "recompute_expansion"):
            module.recompute_expansion = True
    with torch.enable_grad():
        model(torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 1, 6, 16))
    assert not calls


def options_of(tiny_options, *more):
    return load_config(TINY_YAML, [*tiny_options, *more])


def test_the_option_reaches_every_mix_ffn(image_options):
    trainer = Trainer(
        options_of(image_options, "--train.extra.checkpoint_ffn=true", "--train.grad_checkpointing=false")
    )
    assert all(block.mlp.recompute_expansion for block in trainer.networks.transformer.blocks)
    trainer.train()
    assert trainer.step == 4


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--train.extra.checkpoint_ffn=true", "--train.grad_checkpointing=true"], "both true"),
        (["--train.extra.checkpoint_ffn=true", "--train.grad_checkpointing=false", "--model.ffn_type=mlp"], "Mix-FFN"),
    ],
)
def test_options_that_can_take_no_effect_are_refused(tiny_options, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Trainer(options_of(tiny_options, *overrides))


def test_kernels_without_a_device_for_them_are_refused(tiny_options, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match=r"train\.extra\.kernels is triton.*CUDA"):
        Trainer(options_of(tiny_options, "--train.extra.kernels=triton"))


INTERPRETED = """
import json, sys
import torch
from sana.config import load_config
from sana.training.trainer import Trainer
losses = []
for kernels, again in (("auto", "false"), ("triton", "false"), ("triton", "true")):
    extra = [f"--train.extra.kernels={kernels}", f"--train.extra.checkpoint_ffn={again}"]
    options = [*json.loads(sys.argv[1]), *extra, f"--work_dir={sys.argv[2]}/{kernels}_{again}"]
    trainer = Trainer(load_config("configs/sana_config/tiny/Sana_tiny_img256.yaml", options))
    for step in range(2):
        trainer.train_step([trainer.data.next_batch()])
    trainer.settle()
    losses.append([trainer.report.losses, trainer.report.grad_norms])
print(json.dumps(losses))
"""


def test_two_steps_through_the_kernels_train_as_without_them(image_options, tmp_path):
    pytest.importorskip("triton")
    options = [
        *image_options, "--train.gradient_accumulation_steps=1", "--train.train_batch_size=1",
        "--train.grad_checkpointing=false",
    ]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, json.dumps(options), str(tmp_path)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    plain, fused, again = torch.tensor(json.loads(done.stdout.splitlines()[-1]))  # losses and norms of gradients each
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    assert torch.equal(again, fused) and not torch.equal(fused, plain)  # other sums in another order
