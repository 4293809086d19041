"""Every entry of the table: exact continuation after a restart, groups, names, arguments, scaling, shards."""

import io
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sana.config import ConfigError
from sana.training.optimizer import (
    FSDP_REFUSALS,
    OPTIMIZERS,
    auto_scale_lr,
    build_optimizer,
    fsdp_refusal,
    merge_groups,
    parameter_groups,
)

SHAPES = {"linear.weight": (130, 140), "conv.weight": (6, 4, 1, 1), "deep.weight": (6, 1, 3, 3), "norm.bias": (7,)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def options(name: str, **changes) -> dict:
    return {"type": name, "lr": 1.0 if name == "Prodigy" else 1e-2, "weight_decay": 0.1, **changes}


def build(named: dict[str, nn.Parameter], name: str, **changes) -> torch.optim.Optimizer:
    package = OPTIMIZERS.target(name).split(":")[0].split(".")[0]
    if package not in ("torch", "sana"):
        pytest.importorskip(package)
    return build_optimizer(named.items(), options(name, **changes))


def take_steps(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients that depend on the step and on the parameters."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in named.values():
            parameter.grad = 2 * parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_restart_continues_with_the_same_bits(name: str) -> None:
    unbroken = parameters()
    optimizer = build(unbroken, name)
    take_steps(unbroken, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": {k: v.detach() for k, v in unbroken.items()}}, file)
    take_steps(unbroken, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = {key: nn.Parameter(value) for key, value in saved["weights"].items()}
    fresh = build(resumed, name)
    fresh.load_state_dict(saved["optimizer"])
    take_steps(resumed, fresh, range(3, 6))
    for key, value in unbroken.items():
        assert torch.equal(value, resumed[key]), key
        assert not torch.equal(value, parameters()[key]), f"{key} did not move"


@pytest.mark.parametrize("foreach", [False, True])
def test_merged_groups_train_as_the_official_one_group_a_parameter(foreach: bool) -> None:
    ours, official = parameters(), parameters()
    merged = build(ours, "AdamW", foreach=foreach)
    groups = [
        {**group, "params": [parameter for _, parameter in group["params"]]}
        for group in parameter_groups(official.items(), 1e-2, 0.1)
    ]
    assert (len(merged.param_groups), len(groups)) == (1, 4)
    take_steps(ours, merged, range(5))
    take_steps(official, torch.optim.AdamW(groups, foreach=False), range(5))
    for key in ours:
        torch.testing.assert_close(ours[key], official[key], rtol=1e-6, atol=1e-7)


def test_groups_keep_the_order_leave_out_what_is_frozen_and_scale_by_name() -> None:
    named = parameters()
    named["conv.weight"].requires_grad_(False)
    scales = {"0.5": ["weight"], "0": ["linear"]}
    groups = parameter_groups(named.items(), 1e-2, 0.1, scales)
    assert [(group["params"][0][0], group["lr"]) for group in groups] == [
        ("linear.weight", 0.0), ("deep.weight", 5e-3), ("norm.bias", 1e-2)
    ]  # fmt: skip
    optimizer = build_optimizer(named.items(), options("AdamW"), name_scales=scales)
    take_steps(named, optimizer, range(2))
    assert torch.equal(named["linear.weight"], parameters()["linear.weight"])
    assert torch.equal(named["conv.weight"], parameters()["conv.weight"])
    assert not torch.equal(named["deep.weight"], parameters()["deep.weight"])


def test_merging_joins_equal_options_only() -> None:
    groups = [{"params": [1], "lr": 1}, {"params": [2], "lr": 2}, {"params": [3], "lr": 1}]
    assert merge_groups(groups) == [{"params": [1, 3], "lr": 1}, {"params": [2], "lr": 2}]


def test_numbers_may_be_texts_and_tuples_lists() -> None:
    optimizer = build(
        parameters(), "CAMEWrapper", lr="1e-4", betas=[0.9, "0.999", 0.9999], eps=["1e-30", 1e-16], weight_decay="0"
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.999, 0.9999), (1e-30, 1e-16))
    assert build_optimizer(parameters().items(), options("Lion"), lr_scale=0.5).param_groups[0]["lr"] == 5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "CAMEWraper"}, "Did you mean 'CAMEWrapper'.*AdamW.*Prodigy"),
        ({"type": None}, "type is missing"),
        ({"momentum": 0.9}, "AdamW has no argument 'momentum'.*weight_decay"),
        ({"beta": [0.9, 0.99]}, "Did you mean 'betas'"),
        ({"betas": [0.9, 0.99, 0.999]}, "betas of AdamW is .* list of 2 numbers"),
        ({"betas": [0.9, 1.0]}, "below 1"),
        ({"betas": 0.9}, "list of 2"),
        ({"eps": [1e-8, 1e-8]}, "must be a number"),
        ({"amsgrad": 1}, "true or false"),
        ({"lr": None}, "lr is missing"),
        ({"lr": 0}, "positive"),
        ({"lr": "fast"}, "must be a number"),
        ({"lr": math.nan}, "positive"),
        ({"lr": True}, "must be a number"),
        ({"weight_decay": -0.1}, "not negative"),
        ({"type": "CAMEWrapper", "eps": 1e-8}, "eps of CAMEWrapper .* list of 2"),
        ({"type": "CAME8BitWrapper", "block_size": 0}, "block_size is 0"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(parameters().items(), {**options("AdamW"), **changes})


def test_nothing_to_train_unmatched_names_and_scales_for_prodigy_are_errors() -> None:
    frozen = {name: parameter.requires_grad_(False) for name, parameter in parameters().items()}
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(frozen.items(), options("AdamW"))
    with pytest.raises(ConfigError, match="lr_scale names 'blokcs'"):
        build_optimizer(parameters().items(), options("AdamW"), name_scales={"0.1": ["blokcs"]})
    with pytest.raises(ConfigError, match="'slow'; it must be a number"):
        build_optimizer(parameters().items(), options("AdamW"), name_scales={"slow": ["conv"]})
    pytest.importorskip("prodigyopt")
    with pytest.raises(ConfigError, match="Prodigy"):
        build_optimizer(parameters().items(), options("Prodigy"), name_scales={"0.1": ["conv"]})


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self, name: str) -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(type(OPTIMIZERS), "__getitem__", missing)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes.*sana-python\[bitsandbytes\]"):
        build_optimizer(parameters().items(), options("AdamW8bit"))


def test_lr_scales_with_the_batch_and_leaves_the_options_alone() -> None:
    given = {"type": "Muon", "lr": "1e-3", "adamw_lr": 2e-3}
    ratio, scaled = auto_scale_lr(1024, given, "sqrt", "256")
    assert (ratio, scaled["lr"], scaled["adamw_lr"]) == (2.0, 2e-3, 4e-3)
    assert given["lr"] == "1e-3"
    with pytest.raises(ConfigError, match="rule is 'squared'.*linear, sqrt"):
        auto_scale_lr(32, given, "squared")
    with pytest.raises(ConfigError, match="both must be"):
        auto_scale_lr(0, given)


class OneProcess:
    """A process group of one, so that `fully_shard` makes DTensors."""

    def __enter__(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if fsdp_refusal(name) is None])
def test_shards_train_as_whole_parameters_do(name: str) -> None:
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def train(model: nn.Module) -> list[Tensor]:
        optimizer = build_optimizer(model.named_parameters(), options(name))
        for _ in range(3):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]

    expected = train(network())
    with OneProcess():
        sharded = network()
        fully_shard(sharded)
        assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        actual = [value.detach().clone() for value in train(sharded)]
    for ours, whole in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_refusals_under_fsdp_name_what_works() -> None:
    assert set(FSDP_REFUSALS) < set(OPTIMIZERS)
    assert "CAMEWrapper" in fsdp_refusal("CAME")
    assert fsdp_refusal("AdamW") is None
