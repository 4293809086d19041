"""Learning-rate schedules: ends, middles, monotony, the torch scheduler, and refused arguments."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sana.config import ConfigError
from sana.training.lr_scheduler import SCHEDULES, build_lr_scheduler, lr_factor


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_in_equal_parts_to_one_and_then_nothing_rises(name: str) -> None:
    factors = [lr_factor(name, step, total_steps=50, num_warmup_steps=5) for step in range(51)]
    assert factors[:6] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(factors[5:]))
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.0)
    assert lr_factor(name, 0, total_steps=50) == 1.0


def test_middles_of_the_falls() -> None:
    for name in ("linear", "cosine"):
        assert lr_factor(name, 30, total_steps=50, num_warmup_steps=10) == pytest.approx(0.5)
    assert lr_factor("linear", 60, total_steps=50) == 0
    options = {"total_steps": 100, "num_decay": 0.5, "final_lr": 0.2}
    assert lr_factor("cosine_decay_to_constant", 25, **options) == pytest.approx(0.6)
    assert lr_factor("cosine_decay_to_constant", 80, **options) == 0.2


def test_every_group_follows_and_a_restart_continues() -> None:
    def make() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, build_lr_scheduler(optimizer, "linear", {"num_warmup_steps": 2}, total_steps=6)

    def advance(optimizer: torch.optim.Optimizer, scheduler, count: int) -> list[tuple[float, float]]:
        used = []
        for _ in range(count):
            used.append(tuple(group["lr"] for group in optimizer.param_groups))
            optimizer.step()
            scheduler.step()
        return used

    optimizer, scheduler = make()
    used = advance(optimizer, scheduler, 3)
    states = optimizer.state_dict(), scheduler.state_dict()
    used += advance(optimizer, scheduler, 3)
    assert [first for first, _ in used] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert [second for _, second in used] == pytest.approx([0, 0.05, 0.1, 0.075, 0.05, 0.025])
    resumed = make()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert advance(*resumed, 3) == used[3:]


@pytest.mark.parametrize(
    ("name", "args", "more", "message"),
    [
        ("cosin", {}, {}, "'cosin'.*Did you mean 'cosine'.*linear"),
        ("cosine", {"num_warmup_step": 3}, {}, "no key 'num_warmup_step' for cosine.*Did you mean 'num_warmup_steps'"),
        ("constant", {"num_cycles": 2}, {}, "no key 'num_cycles' for constant"),
        ("linear", {"num_warmup_steps": -1}, {}, "not negative"),
        ("linear", {"num_warmup_steps": "many"}, {}, "must be a number"),
        ("linear", {}, {"total_steps": 0}, "0 optimiser steps"),
        ("cosine_decay_to_constant", {}, {"lr_scale_ratio": 0.5}, "scaled it down, by 0.5"),
    ],
)
def test_what_does_not_fit_is_named(name: str, args: dict, more: dict, message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=message):
        build_lr_scheduler(optimizer, name, args, **{"total_steps": 10, **more})
