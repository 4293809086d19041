"""ReLU linear attention against the quadratic definition in float64."""

import pytest
import torch
from torch import Tensor

from sana.ops import relu_linear_attention
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
