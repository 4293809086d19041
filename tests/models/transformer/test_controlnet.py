"""The control branch: zero at the start, a copy of the first blocks, and its effect afterwards."""

import pytest
import torch

from sana.models.transformer.controlnet import SanaMSControlNet
from sana.models.transformer.sana import SanaMS
from tests.models.transformer.networks import SMALL, inputs, small


def test_a_fresh_branch_changes_nothing() -> None:
    arguments = {**SMALL, "depth": 3, "copy_blocks_num": 2}
    model = SanaMSControlNet(**arguments).eval()
    base = SanaMS(**arguments).eval()
    base.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("controlnet")})
    batch = inputs()
    out = model(**batch, data_info={"control_signal": torch.randn(2, 4, 4, 6)})
    torch.testing.assert_close(out, base(**batch))
    for index, control in enumerate(model.controlnet):
        for mine, theirs in zip(control.copied_block.parameters(), model.blocks[index].parameters(), strict=True):
            assert torch.equal(mine, theirs) and mine is not theirs


def test_the_signal_acts_once_the_branch_is_trained() -> None:
    model, batch = small(SanaMSControlNet), inputs()
    first, second = torch.randn(2, 1, 4, 4, 6).unbind(0)
    outs = [model(**batch, data_info={"control_signal": signal}) for signal in (first, second)]
    assert not torch.allclose(*outs, atol=1e-3)
    shared = model(**{k: v[:1] for k, v in batch.items()}, data_info={"control_signal": first})
    assert torch.equal(shared, outs[0][:1])  # one signal serves every row


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="from 1 to depth - 1 = 1, not 2"):
        small(SanaMSControlNet, copy_blocks_num=2)
    with pytest.raises(ValueError, match="control_signal"):
        small(SanaMSControlNet)(**inputs())
