"""The average against its closed form."""

import torch
from torch import nn

from sana.training.ema import ExponentialMovingAverage


def test_average_equals_the_weighted_sum_with_warm_up():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema, expected = ExponentialMovingAverage(module, decay=0.5), 1.0
    for n, value in enumerate([2.0, 4.0, 8.0, 16.0], start=1):
        nn.init.constant_(module.weight, value)
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    ema.copy_to(module)
    torch.testing.assert_close(module.weight.item(), expected)


def test_state_round_trips():
    module = nn.Linear(3, 2)
    ema = ExponentialMovingAverage(module)
    nn.init.zeros_(module.weight)
    ema.update(module)
    other = ExponentialMovingAverage(nn.Linear(3, 2))
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    torch.testing.assert_close(other.average["weight"], ema.average["weight"])


def test_the_average_is_applied_and_taken_back_bit_for_bit():
    module = nn.Linear(3, 2)
    ema = ExponentialMovingAverage(module)
    before = module.weight.detach().clone()
    average = ema.average["weight"].clone()
    nn.init.normal_(module.weight)
    own = module.weight.detach().clone()
    try:
        with ema.applied(module):
            assert torch.equal(module.weight, before) and torch.equal(module.weight, average)
            raise KeyError
    except KeyError:
        assert torch.equal(module.weight, own)
