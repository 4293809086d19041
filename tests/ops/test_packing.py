"""The budget of packed copies can be set; what is packed is tested with the operators that use it."""

from typing import Any

import pytest
import torch

from sana.ops.packing import pack, pack_budget, set_pack_budget


@pytest.fixture(autouse=True)
def usual_budget():
    yield
    set_pack_budget(None)


def test_a_budget_holds_until_the_machine_is_asked_again():
    usual = pack_budget()
    set_pack_budget(1234)
    assert pack_budget() == 1234
    set_pack_budget(None)
    assert pack_budget() == usual > 0


def test_copies_are_made_within_the_budget_only():
    weight, made = torch.zeros(4, 4), []

    def make() -> torch.Tensor:
        made.append(1)
        return weight.clone()

    set_pack_budget(weight.nbytes - 1)
    assert pack(weight, None, make) is None
    set_pack_budget(None)
    copy = pack(weight, None, make)
    assert copy is not None
    assert pack(weight, None, make) is copy


def test_a_budget_of_nothing_gives_up_the_copies_that_are_there():
    weight = torch.zeros(4, 4)
    assert pack(weight, None, weight.clone) is not None
    set_pack_budget(0)
    assert pack(weight, None, weight.clone) is None


@pytest.mark.parametrize("limit", [-1, 1.5, "1GB", True])
def test_nonsense_is_no_budget(limit: Any):
    with pytest.raises(ValueError, match="number of bytes"):
        set_pack_budget(limit)
