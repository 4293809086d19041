"""Cross-attention against an explicit softmax over the readable tokens, and the switches of all attentions."""

import pytest
import torch

from sana.models.transformer.attention import (
    CrossAttention,
    LinearAttention,
    SoftmaxAttention,
    VanillaCrossAttention,
    readable_tokens,
    set_fp32_attention,
)
from sana.ops.linear_attention import cpu, wide
from sana.pipelines.memory.tracker import MemoryTracker
from tests.tolerance import assert_rms_close


@pytest.mark.parametrize("kind", [CrossAttention, VanillaCrossAttention])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_equals_a_softmax_over_readable_tokens(kind: type[CrossAttention], qk_norm: bool) -> None:
    attention = kind(8, 2, qk_norm=qk_norm).double()
    x, cond = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0]])
    out = attention(x, cond, mask)
    for row in range(2):
        chosen = cond[row, mask[row].bool()]
        query, (key, value) = attention.q_linear(x[row]), attention.kv_linear(chosen).chunk(2, dim=-1)
        query, key = attention.q_norm(query), attention.k_norm(key)
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (query[:, head] @ key[:, head].T / 2).softmax(-1)
            heads.append(weights @ value[:, head])
        torch.testing.assert_close(out[row], attention.proj(torch.cat(heads, dim=-1)))
    torch.testing.assert_close(attention(x, cond[:, None], mask), out)


def test_a_row_without_readable_tokens_reads_all() -> None:
    mask = torch.tensor([[0, 0], [0, 1]])
    assert readable_tokens(mask).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("attention", [LinearAttention(8, 2, qk_norm=True), SoftmaxAttention(8, 2, qk_norm=True)])
def test_identity_rows_project_the_value(attention: LinearAttention | SoftmaxAttention) -> None:
    x = torch.randn(3, 5, 8)
    value = attention.qkv(x)[..., 16:]
    torch.testing.assert_close(attention(x, identity_rows=3), attention.proj(value))
    mixed = attention(x, identity_rows=1)
    torch.testing.assert_close(mixed[:2], attention(x)[:2])
    torch.testing.assert_close(mixed[2], attention.proj(value)[2])


@pytest.mark.parametrize("module", [LinearAttention(8, 2), SoftmaxAttention(8, 2)])
def test_fp32_attention_holds_under_autocast(module: torch.nn.Module) -> None:
    seen = []
    attend = module.attend
    module.attend = lambda *tensors: (seen.append(tensors[0].dtype), attend(*tensors))[1]
    for enabled in (True, False):
        set_fp32_attention(module, enabled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(torch.randn(1, 4, 8))
    assert seen == [torch.float32, torch.bfloat16]


def test_heads_must_divide_the_width() -> None:
    for kind in (LinearAttention, SoftmaxAttention, CrossAttention):
        with pytest.raises(ValueError, match="8 must be a multiple of the number of heads 3"):
            kind(8, 3)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["linear", "rotated", "cross"])
def test_no_float32_copy_of_all_tokens_is_made(kind: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's own form and with the plain one that runs on other devices: a few chunks more, and no more."""
    if plain:
        monkeypatch.setattr("sana.ops.backend._is_cpu_inference", lambda x: False)
    chunk, tokens, dim = 2**14, 4096, 32
    for module in (cpu, wide):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    attention = CrossAttention(dim, 4) if kind == "cross" else LinearAttention(dim, 4, qk_norm=True)
    attention.bfloat16().requires_grad_(False)
    x = torch.randn(2, tokens, dim).bfloat16()
    angles = torch.randn(tokens, dim // 4)
    more = {
        "linear": (), "rotated": ((angles.cos(), angles.sin()),), "cross": (torch.randn(2, 16, dim).bfloat16(),)
    }[kind]  # fmt: skip
    peaks, results = {}, {}
    for fp32 in (False, True):
        set_fp32_attention(attention, fp32)
        with torch.no_grad():
            attention(x, *more)  # weights are packed at the first use
            with MemoryTracker() as tracker:
                results[fp32] = attention(x, *more)
        peaks[fp32] = tracker.peak
    assert peaks[True] <= peaks[False] + 12 * chunk
    assert 12 * chunk < 2 * tokens * dim * 4, "one such copy would be seen"
    with torch.enable_grad():  # float32 copies of all
        expected = attention(x.requires_grad_(), *more)
    assert_rms_close(results[True], expected.detach())
