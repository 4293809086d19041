"""ReLU linear attention against the quadratic definition in float64."""

import pytest
import torch
from torch import Tensor

from sana.ops import relu_linear_attention
from sana.ops.linear_attention.reference import linear_attention_reference
from tests.tolerance import assert_rms_close


def quadratic(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """The definition with an explicit N x N matrix of weights."""
    weights = query.clamp(min=0) @ key.clamp(min=0).transpose(-1, -2)  # (B, h, N, N)
    return (weights @ value) / (weights.sum(-1, keepdim=True) + eps)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 7, 8), (1, 2, 65, 32), (3, 1, 16, 5)])
def test_output_and_gradients_equal_the_quadratic_form(shape: tuple[int, ...]) -> None:
    inputs = draw(shape, torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = relu_linear_attention(*inputs, 1e-8), quadratic(*wide, 1e-8)
    assert_rms_close(out, expected.float(), what="o")
    cotangent = torch.randn(shape)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    for name, mine, theirs in zip(("dq", "dk", "dv"), inputs, wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4, msg=f"{name} differs")


def test_a_query_without_a_positive_entry_gives_zero() -> None:
    query, key, value = draw((1, 2, 5, 4), torch.float32)
    assert torch.equal(relu_linear_attention(-query.abs(), key, value), torch.zeros(1, 2, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_divided_in_float32(dtype: torch.dtype) -> None:
    query, key, value = (tensor.detach() for tensor in draw((1, 2, 33, 16), dtype))
    out = relu_linear_attention(query, key, value)
    assert out.dtype == torch.float32
    expected = quadratic(query.double(), key.double(), value.double(), 1e-8)
    torch.testing.assert_close(out.double(), expected, rtol=3e-2, atol=3e-2)


def test_every_output_is_written(nan_memory: None) -> None:
    query, key, value = (tensor.detach() for tensor in draw((2, 2, 9, 4), torch.float32))
    assert torch.isfinite(relu_linear_attention(query, key, value)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_packed_form_norms_all_heads_and_keeps_their_order(dtype: torch.dtype) -> None:
    heads, dim = 3, 4
    qkv = torch.randn(2, 7, 3 * heads * dim).to(dtype)
    weights = [1 + torch.randn(heads * dim) / 4 for _ in range(2)]
    out = linear_attention_reference(qkv, heads, q_weight=weights[0], k_weight=weights[1], norm_eps=1e-3)
    query, key, value = qkv.double().split(heads * dim, dim=-1)
    query, key = (
        tensor / (tensor.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
        for tensor, weight in zip((query, key), weights, strict=True)
    )
    assert out.dtype == dtype
    for head in range(heads):
        columns = slice(head * dim, (head + 1) * dim)
        expected = quadratic(query[..., columns], key[..., columns], value[..., columns], 1e-8)
        assert_rms_close(out[..., columns], expected, what=f"head {head}")
    plain = linear_attention_reference(qkv[..., : 3 * dim], 1)
    expected = quadratic(*qkv[..., : 3 * dim].double().split(dim, dim=-1), 1e-8)
    assert_rms_close(plain, expected, what="without norms")
