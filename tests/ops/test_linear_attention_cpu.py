"""The CPU's linear attention against the reference, with and without norms, in place or not."""

import pytest
import torch

from sana.ops import linear_attention
from sana.ops.linear_attention import cpu
from sana.ops.linear_attention.reference import linear_attention_reference
from tests.tolerance import assert_rms_close


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norms", [(), ("q_weight",), ("q_weight", "k_weight")])
@pytest.mark.parametrize(("rows", "tokens", "heads", "dim"), [(1, 1, 1, 8), (2, 7, 3, 16), (3, 64, 2, 32)])
def test_equals_the_reference(dtype, norms, rows, tokens, heads, dim):
    qkv = torch.randn(rows, tokens, 3 * heads * dim).to(dtype)
    options = {name: torch.rand(heads * dim) for name in norms}
    expected = linear_attention_reference(qkv.float() if dtype != torch.float64 else qkv, heads, **options)
    kept = qkv.clone()
    assert_rms_close(linear_attention(qkv, heads, **options), expected.to(dtype))
    assert torch.equal(qkv, kept)
    assert_rms_close(linear_attention(qkv, heads, inplace=True, **options), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_query_without_a_positive_entry_gives_zero(dtype):
    qkv = torch.randn(1, 5, 3 * 16).to(dtype)
    qkv[:, 2, :16] = -1
    out = linear_attention(qkv, 1)
    assert torch.equal(out[:, 2], torch.zeros(1, 16, dtype=dtype)) and torch.isfinite(out).all()


def test_a_row_does_not_depend_on_the_others_bitwise():
    qkv = torch.randn(3, 20, 3 * 32)
    together = linear_attention(qkv, 2)
    assert torch.equal(torch.cat([linear_attention(row, 2) for row in qkv.split(1)]), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norms", [(), ("q_weight", "k_weight")])
def test_chunks_of_tokens_give_the_same(monkeypatch, dtype, norms):
    qkv = torch.randn(2, 37, 3 * 64).to(dtype)
    options = {name: torch.rand(64).to(dtype) for name in norms}
    whole = linear_attention(qkv, 2, **options)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 8 * 64 * qkv.element_size())
    assert_rms_close(linear_attention(qkv, 2, **options), whole)
    assert_rms_close(linear_attention(qkv[1:], 2, **options), whole[1:])
    assert_rms_close(linear_attention(qkv, 2, inplace=True, **options), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_of_4096_pixels_add_up(dtype):
    qkv = torch.randn(1, 16384, 3 * 64).to(dtype)
    expected = linear_attention_reference(qkv.double(), 2)
    assert_rms_close(linear_attention(qkv, 2), expected.to(dtype))
