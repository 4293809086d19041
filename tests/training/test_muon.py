"""Muon: orthogonal updates, the split of parameters, and that it minimises."""

import torch
from torch import nn

from sana.training.muon import Muon, orthogonalise, split_parameters


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
