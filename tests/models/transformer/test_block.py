"""The block's residual structure and the layers that an architecture chooses."""

import pytest
import torch

from sana.models.transformer.architecture import SanaArchitecture
from sana.models.transformer.attention import LinearAttention, SoftmaxAttention, VanillaCrossAttention
from sana.models.transformer.block import DropPath, SanaBlock
from sana.models.transformer.mix_ffn import DepthwiseMlp, MixFFN, Mlp, PreGluMBConv

SHAPE = {"hidden_size": 16, "num_heads": 2, "linear_head_dim": 8, "mlp_ratio": 2.0}


def block(**changes: object) -> SanaBlock:
    return SanaBlock(SanaArchitecture.from_kwargs({"attn_type": "linear", "ffn_type": "glumbconv", **SHAPE, **changes}))


def test_modulation_is_ordered_shift_scale_gate_for_attention_then_ffn() -> None:
    module = block().eval()
    module.scale_shift_table.data.zero_()
    x, y = torch.randn(1, 6, 16), torch.randn(1, 3, 16)
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = torch.randn(6, 16)
    out = module(x, y, torch.cat([shift_a, scale_a, gate_a, shift_f, scale_f, gate_f])[None], HW=(2, 3))
    norm = torch.nn.LayerNorm(16, elementwise_affine=False, eps=1e-6)
    expected = x + gate_a * module.attn(norm(x) * (1 + scale_a) + shift_a)
    expected = expected + module.cross_attn(expected, y)
    expected = expected + gate_f * module.mlp(norm(expected) * (1 + scale_f) + shift_f, (2, 3))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ffn_type", "kind", "dilation"),
    [
        ("glumbconv", MixFFN, (1, 1)),
        ("glumbconv_dilate", MixFFN, (2, 2)),
        ("mbconvpreglu", PreGluMBConv, (1, 1)),
        ("dwmlp", DepthwiseMlp, None),
        ("mlp", Mlp, None),
    ],
)
def test_feed_forward_kinds(ffn_type: str, kind: type, dilation: tuple[int, int] | None) -> None:
    module = block(ffn_type=ffn_type)
    assert type(module.mlp) is kind
    if dilation:
        assert module.mlp.depth_conv.conv.dilation == dilation
    assert module(torch.randn(2, 6, 16), torch.randn(2, 3, 16), torch.randn(2, 96), HW=(3, 2)).shape == (2, 6, 16)


@pytest.mark.parametrize("attn_type", ["linear", "flash", "vanilla"])
def test_qk_norm_is_rms_for_linear_layer_norm_for_flash_and_nothing_for_vanilla(attn_type: str) -> None:
    module = block(attn_type=attn_type, qk_norm=True)
    assert type(module.attn) is (LinearAttention if attn_type == "linear" else SoftmaxAttention)
    keys = {key for key in module.state_dict() if "norm" in key}
    expected = {
        "linear": {"attn.q_norm.weight", "attn.k_norm.weight"},
        "flash": {f"attn.{part}_norm.{leaf}" for part in "qk" for leaf in ("weight", "bias")},
        "vanilla": set(),
    }
    assert keys == expected[attn_type]


def test_cross_attention_kinds() -> None:
    module = block(cross_attn_type="vanilla", cross_norm=True)
    assert type(module.cross_attn) is VanillaCrossAttention
    assert module.cross_attn.q_norm.eps == 1e-6 and block(qk_norm=True).attn.q_norm.eps == 1e-5


def test_stochastic_depth_skips_whole_rows_in_training() -> None:
    arch = SanaArchitecture.from_kwargs({"attn_type": "linear", "ffn_type": "glumbconv", **SHAPE})
    module = SanaBlock(arch, drop_path=0.999999)
    x, y, t = torch.randn(2, 6, 16), torch.randn(2, 3, 16), torch.randn(2, 96)
    torch.testing.assert_close(module.train()(x, y, t, HW=(2, 3)), x + module.cross_attn(x, y))
    assert not torch.allclose(module.eval()(x, y, t, HW=(2, 3)), x + module.cross_attn(x, y), atol=1e-3)


def test_stochastic_depth_keeps_the_mean() -> None:
    out = DropPath(0.25).train()(torch.ones(4000, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.95 < out.mean() < 1.05
    assert torch.equal(out[:, 0], out[:, 1])
