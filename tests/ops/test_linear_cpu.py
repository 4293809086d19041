"""The CPU's own products and Mix-FFN against plain PyTorch, and packed weights that never are out of date."""

import gc
import sys

import pytest
import torch
import torch.nn.functional as F

from sana.ops import mix_ffn, modulated_layer_norm, packing
from sana.ops.linear.cpu import linear_cpu
from tests.tolerance import assert_rms_close

ACTS = {None: lambda x: x, "silu": F.silu, "relu": F.relu}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.fixture
def packs(monkeypatch):
    """The number of copies made so far, as a function."""
    made = []
    pack = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *a: made.append(1) or pack(*a))
    return lambda: len(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("shape", [(24, 17), (24, 17, 1, 1)])
def test_product_bias_and_activation(dtype, act, shape):
    x, weight, bias = torch.randn(2, 5, 17), torch.randn(shape), torch.randn(24)
    expected = ACTS[act](F.linear(x.double(), weight.double().flatten(1), bias.double()))
    out = linear_cpu(x.to(dtype), weight.to(dtype), bias.to(dtype), act)
    assert out.dtype == dtype
    if dtype != torch.bfloat16:
        assert_rms_close(out, expected.to(dtype))
    else:  # inputs were rounded too
        torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("with_bias", [True, False])
def test_halves(with_bias):
    x, weight, bias = torch.randn(3, 8), torch.randn(12, 8), torch.randn(12) if with_bias else None
    both = torch.cat([linear_cpu(x, weight, bias, half=half) for half in (0, 1)], dim=-1)
    assert_rms_close(both, F.linear(x, weight, bias))


def test_a_weight_is_packed_once_and_again_after_every_change(packs):
    layer = torch.nn.Linear(16, 8).requires_grad_(False)
    x = torch.randn(4, 16)
    for _ in range(3):
        linear_cpu(x, layer.weight, layer.bias)
    assert packs() == 1
    changes = (
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict({"weight": torch.randn(8, 16), "bias": torch.zeros(8)}),
        lambda: layer.weight[0].zero_(),
        lambda: layer.double().float(),
        lambda: layer.bfloat16().float(),
    )
    for count, change in enumerate(changes, start=2):
        change()
        assert_rms_close(linear_cpu(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias))
        assert packs() == count


def test_a_copy_goes_with_its_weight():
    gc.collect()
    before = len(packing._packed)
    weight = torch.randn(8, 16)
    linear_cpu(torch.randn(1, 16), weight)
    assert len(packing._packed) == before + 1
    del weight
    gc.collect()
    assert len(packing._packed) == before


def test_a_weight_that_learns_and_one_beyond_the_budget_are_not_packed(packs, monkeypatch):
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    assert_rms_close(linear_cpu(x, torch.nn.Parameter(weight)), F.linear(x, weight))
    monkeypatch.setattr(packing, "pack_budget", lambda: weight.nbytes - 1)
    assert_rms_close(linear_cpu(x, weight), F.linear(x, weight))
    assert packs() == 0


def test_without_onednn_pytorch_multiplies(monkeypatch):
    monkeypatch.setattr(packing, "available", lambda: False)
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    assert torch.equal(linear_cpu(x, weight, act="relu"), F.relu(F.linear(x, weight)))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("cache", [0, 2**24])
def test_mix_ffn(grid, dilation, with_bias, cache, monkeypatch):
    monkeypatch.setattr(sys.modules["sana.ops.mix_ffn.cpu"], "CACHE_BYTES", cache)
    shapes = ((24, 8, 1, 1), (24, 1, 3, 3), (6, 12, 1, 1))
    weights = [(torch.randn(shape), torch.randn(shape[0]) if with_bias else None) for shape in shapes]
    x = torch.randn(1, grid[0] * grid[1], 8)
    arguments = (x, grid, *weights)
    kept = x.clone()
    assert_rms_close(
        mix_ffn(*arguments, dilation=dilation, backend="cpu"),
        mix_ffn(*arguments, dilation=dilation, backend="reference"),
    )
    assert torch.equal(x, kept)


@pytest.mark.parametrize("rows", [1, 2])
def test_modulated_layer_norm(rows):
    x, shift, scale = torch.randn(2, 7, 32) * 3 + 1, torch.randn(rows, 1, 32), torch.randn(rows, 1, 32)
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    for backend in ("cpu", "reference"):
        out = modulated_layer_norm(x, shift, scale, backend=backend)
        assert_rms_close(out, (normed * (1 + scale) + shift).float())
