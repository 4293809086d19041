"""Lion by hand: every coordinate moves by lr, and a frozen coordinate only decays."""

import torch
from torch import nn

from sana.training.lion import Lion


def test_two_steps_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([parameter], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    parameter.grad = torch.tensor([2.0, -1.0, 0.0])
    optimizer.step()
    # decay by 1 - 0.1 * 0.5, then 0.1 against the sign of the gradient
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.95 - 0.1, -1.9 + 0.1, 2.85]))
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([0.5, -0.25, 0.0]))
    before = parameter.detach().clone()
    parameter.grad = torch.tensor([-0.1, 0.5, 1.0])  # momentum outweighs the first: 0.5 * 0.5 - 0.5 * 0.1 > 0
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), before * 0.95 - 0.1 * torch.tensor([1.0, 1.0, 1.0]))


def test_parameters_without_a_gradient_stay() -> None:
    trained, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([trained, idle], lr=0.1, weight_decay=0.5)
    trained.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(2))
    assert not torch.equal(trained.detach(), torch.ones(2))
    Lion([idle], lr=0.1).step()  # nothing to do is no error
