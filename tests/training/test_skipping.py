"""Steps that the device leaves out: nothing changes to the bit, and a good step is the ordinary one."""

import pytest
import torch
from torch import nn

from sana.training.optimizer import OPTIMIZERS, build_optimizer
from sana.training.skipping import skips_on_device, step_unless, uncount_step

SKIPPING = ("AdamW", "CAMEWrapper", "CAME8BitWrapper", "Lion", "Muon")
SHAPES = {"linear.weight": (130, 140), "conv.weight": (6, 4, 1, 1), "deep.weight": (6, 1, 3, 3), "norm.bias": (7,)}


def make(name):
    generator = torch.Generator().manual_seed(0)
    named = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
    return named, build_optimizer(named.items(), {"type": name, "lr": 1e-2, "weight_decay": 0.1})


def give_gradients(named, step, value=None):
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if value is not None:
            parameter.grad.view(-1)[0] = value


def contents(named, optimizer):
    state = [value for parameter in named.values() for value in optimizer.state[parameter].values()]
    return [torch.as_tensor(value).clone() for value in [*named.values(), *state]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_left_out_changes_nothing_and_the_others_are_as_ever(name, bad):
    plain, guarded = make(name), make(name)
    assert skips_on_device(guarded[1])
    for step in range(4):
        for named, _ in (plain, guarded):
            give_gradients(named, step)
        plain[1].step()
        step_unless(guarded[1], torch.tensor(False))
        before = contents(*guarded)
        give_gradients(guarded[0], step, bad)
        step_unless(guarded[1], torch.tensor(True))
        uncount_step(guarded[1])
        for one, other in zip(before, contents(*guarded), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(contents(*plain), contents(*guarded), strict=True):
        assert torch.equal(one, other)


def test_a_first_step_left_out_leaves_a_fresh_state():
    for name in SKIPPING:
        plain, guarded = make(name), make(name)
        give_gradients(guarded[0], 9, float("nan"))
        step_unless(guarded[1], torch.tensor(True))
        uncount_step(guarded[1])
        for named, optimizer in (plain, guarded):
            give_gradients(named, 1)
            optimizer.step()
        for one, other in zip(contents(*plain), contents(*guarded), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(SKIPPING)))
def test_the_others_do_not_claim_to(name):
    package = OPTIMIZERS.target(name).split(":")[0].split(".")[0]
    pytest.importorskip(package)
    assert not skips_on_device(make(name)[1])


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_an_older_state_that_is_not_fused_is_not_trusted_to_skip(name):
    named, optimizer = make(name)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
    optimizer.load_state_dict(state)
    assert not skips_on_device(optimizer)
    give_gradients(named, 0)
    optimizer.step()  # goes on as it was
