"""Muon: orthogonal updates, the split of parameters, and that it minimises."""

import torch
from torch import nn

from sana.training.muon import Muon, MuonWithAdamW, orthogonalise, split_parameters


def test_singular_values_become_nearly_one_and_directions_stay():
    torch.manual_seed(0)
    matrix = torch.randn(24, 60)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    values = torch.diagonal(u.T @ result @ v.T)
    assert (values > 0.6).all() and (values < 1.3).all()
    off_diagonal = u.T @ result @ v.T - torch.diag(values)
    assert off_diagonal.abs().max() < 1e-3
    torch.testing.assert_close(orthogonalise(matrix.T), result.T)


def test_split_sends_matrices_and_dense_kernels_to_muon_and_the_rest_to_adamw():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(64, 32),
            "conv": nn.Conv2d(8, 16, 3),
            "depthwise": nn.Conv2d(32, 32, 5, groups=32),
            "frozen": nn.Linear(64, 64).requires_grad_(False),
            "embed_tokens": nn.Embedding(100, 32),
        }
    )
    matrices, rest = split_parameters(model, exclude=("embed_tokens",))
    assert {p.shape for p in matrices} == {(32, 64), (16, 8, 3, 3)}
    assert {p.shape for p in rest} == {(32,), (16,), (32, 1, 5, 5), (100, 32)}


def test_a_least_squares_problem_is_solved():
    torch.manual_seed(0)
    target = torch.randn(8, 4, 3, 3)
    weight = nn.Parameter(torch.zeros_like(target))
    optimizer = Muon([weight], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.1


def test_one_optimiser_moves_as_two_by_hand():
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 6))

    def train(network: nn.Sequential, *optimizers: torch.optim.Optimizer) -> list[torch.Tensor]:
        for step in range(4):
            network(torch.full((2, 40), 0.1 * step)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach() for parameter in network.parameters()]

    one, two = model(), model()
    combined = MuonWithAdamW(one.named_parameters(), 1e-2, adamw_lr=2e-3, exclude=("2.",))
    matrices, rest = split_parameters(two, exclude=("2.",))
    assert [tuple(p.shape) for p in matrices] == [(30, 40)]
    parts = (
        Muon(matrices, 1e-2, weight_decay=0.01),
        torch.optim.AdamW(rest, 2e-3, (0.9, 0.98), weight_decay=0.0, fused=True),
    )
    for ours, expected in zip(train(one, combined), train(two, *parts), strict=True):
        assert torch.equal(ours, expected)


def test_a_groups_own_lr_scales_both_parts():
    named = list(nn.Linear(40, 30).named_parameters())
    combined = MuonWithAdamW([{"params": named, "lr": 0.5, "weight_decay": 0.3}], lr=1.0, adamw_lr=0.1)
    matrix, rest = combined.param_groups
    assert (matrix["lr"], matrix["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.5, 0.3, 0.05, 0.0)
