"""16-bit attention computed in float32, in chunks, against the reference on float32 copies of everything."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana.models.transformer.position import apply_rotary
from sana.ops import linear_attention
from sana.ops.linear_attention import cpu, wide
from sana.ops.linear_attention.reference import linear_attention_reference, relu_linear_attention
from tests.tolerance import assert_rms_close


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def heads(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values (2, 3, 37, 8), as views of one packed tensor."""
    packed = torch.randn(2, 37, 72).to(dtype)
    return [part.unflatten(-1, (3, 8)).transpose(1, 2) for part in packed.chunk(3, dim=-1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_chunk_has_the_bits_of_the_reference(dtype):
    packed = heads(dtype)
    expected = relu_linear_attention(*(part.float() for part in packed)).to(dtype)
    actual = wide.relu_linear_attention_fp32(*packed)
    assert torch.equal(actual, expected)
    assert actual.transpose(1, 2).is_contiguous(), "joining the heads copies"


@pytest.mark.parametrize("tokens", [1, 5, 36])
def test_chunks_differ_by_the_order_of_the_sum(tokens, monkeypatch):
    monkeypatch.setattr(wide, "CHUNK_BYTES", tokens * 24 * 4)
    angles = torch.randn(37, 4).repeat_interleave(2, dim=1)
    rotary = (angles.cos(), angles.sin())
    query, key, value = heads()
    turned = apply_rotary(query, rotary), apply_rotary(key, rotary)
    expected = relu_linear_attention(*turned, value)

    def turn(some: Tensor, span: slice) -> Tensor:
        return apply_rotary(some, (rotary[0][span], rotary[1][span]))

    actual = wide.relu_linear_attention_fp32(query, key, value, turn=turn)
    assert_rms_close(actual, expected)  # 1e-5
    alone = wide.relu_linear_attention_fp32(*(part[1:] for part in (query, key, value)), turn=turn)
    assert torch.equal(alone, actual[1:]), "a row does not depend on the others"


@pytest.mark.parametrize("tokens", [5, 100])
def test_queries_are_attended_in_chunks(tokens, monkeypatch):
    monkeypatch.setattr(wide, "CHUNK_BYTES", tokens * 24 * 4)
    seen = []
    query, key, value = heads(torch.bfloat16)

    def attend(some: Tensor) -> Tensor:
        seen.append((some.dtype, some.shape[2]))
        return F.scaled_dot_product_attention(some, key.float(), value.float())

    actual = wide.attend_fp32(query, attend)
    assert_rms_close(actual, attend(query.float()).bfloat16())
    *chunks, whole = seen
    assert sum(count for _, count in chunks) == whole[1] == 37 and max(chunks)[1] <= tokens
    assert {kind for kind, _ in chunks} == {torch.float32}


@pytest.mark.parametrize("norms", [(), ("q_weight", "k_weight")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_cpus_own(dtype, norms, monkeypatch):
    qkv = torch.randn(2, 37, 3 * 64).to(dtype)
    options = {name: torch.rand(64).to(dtype) for name in norms}
    expected = linear_attention_reference(qkv, 2, **options)
    assert_rms_close(linear_attention(qkv, 2, fp32=True, **options), expected)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 8 * 64 * 4)
    kept = qkv.clone()
    together = linear_attention(qkv, 2, fp32=True, **options)
    assert_rms_close(together, expected)
    assert torch.equal(qkv, kept) and together.dtype == dtype
    assert torch.equal(linear_attention(qkv[1:], 2, fp32=True, **options), together[1:])
    norm = tuple(options[name].float() for name in norms) or None
    wide_result = cpu._in_fp32(qkv.float().clone(), 2, 1e-8, norm, 1e-5)
    assert_rms_close(wide_result, linear_attention_reference(qkv.float(), 2, **options))  # 1e-5, before it is rounded


def test_a_query_without_a_positive_entry_gives_zero():
    qkv = torch.randn(1, 5, 3 * 16).half()
    qkv[:, 2, :16] = -1
    out = linear_attention(qkv, 1, fp32=True)
    assert torch.equal(out[:, 2], torch.zeros(1, 16).half()) and torch.isfinite(out).all()
