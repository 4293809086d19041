"""Networks by Triton kernels are the plain networks: same keys, outputs and gradients; never a silent replacement."""

import pytest
import torch

from sana.models.transformer.attention import set_backend, set_fp32_attention
from sana.ops.backend import TritonUnavailableError
from tests.models.transformer.networks import inputs, small
from tests.tolerance import assert_rms_close, rms_ratio

pytest.importorskip("triton")

PAIRS = [
    ({"attn_type": "triton_linear"}, {"attn_type": "linear"}),
    ({"attn_type": "triton_linear", "qk_norm": True}, {"attn_type": "linear", "qk_norm": True}),
    ({"ffn_type": "triton_mbconvpreglu"}, {"ffn_type": "mbconvpreglu"}),
]


def output_and_gradients(model):
    batch = inputs(2, size=(2, 3))
    out = model(**batch)
    out.square().mean().backward()
    return out, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_same(model, plain):
    (out, gradients), (expected, others) = output_and_gradients(model), output_and_gradients(plain)
    assert_rms_close(out, expected)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        if others[name].abs().max() > 1e-6:  # a gradient that is zero but for rounding has no ratio
            assert rms_ratio(gradient, others[name]) < 1e-4, name  # through a whole network; operators meet 1e-5


@pytest.mark.parametrize(("kind", "plain"), PAIRS)
def test_official_triton_kinds(kind, plain):
    model, judge = small(**kind, depth=1), small(**plain, depth=1)
    assert model.state_dict().keys() == judge.state_dict().keys()
    assert model.init_kwargs == {**judge.init_kwargs, **kind}
    assert_same(model, judge)


@pytest.mark.parametrize("fp32", [False, True])
def test_every_operator_of_a_network(fp32):
    model, judge = small(depth=1), small(depth=1)
    set_backend(model, "triton")
    set_fp32_attention(model, fp32)
    assert_same(model, judge)


def test_perturbed_rows_and_prepared_texts():
    model, judge = small(depth=1), small(depth=1)
    set_backend(model, "triton")
    batch = {**inputs(2, size=(2, 3)), "timestep": torch.full((2,), 500.0)}
    options = {"pag_layers": (0,), "pag_rows": 1}
    with torch.no_grad():
        text, time = model.cache_text(batch["y"], batch["mask"]), model.cache_time(batch["timestep"][:1])[0]
        assert_rms_close(model.denoise(batch["x"], time, text, **options), judge(**batch, **options))


def test_without_a_gpu_the_kinds_say_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for changes in PAIRS[0][0], PAIRS[2][0]:
        with pytest.raises(TritonUnavailableError, match="CUDA"):
            small(**changes)(**inputs())


def test_what_the_kernels_cannot_do_is_refused():
    rotated = small(attn_type="triton_linear", use_pe=True, pos_embed_type="3d_rope", depth=1)
    with pytest.raises(ValueError, match="does not rotate"):
        rotated(**inputs())
    for changes, message in (
        ({"ffn_type": "glumbconv_dilate"}, "dilation"),
        ({"mlp_acts": ("relu", "silu", None)}, "SiLU"),
    ):
        model = small(**changes, depth=1)
        set_backend(model, "triton")
        with pytest.raises(ValueError, match=message):
            model(**inputs())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        set_backend(small(), "cuda")


def test_a_compiler_takes_a_block_as_one_graph():
    model = small(depth=1).requires_grad_(False)
    set_backend(model, "triton")
    batch = {**inputs(1, size=(2, 3)), "timestep": torch.full((1,), 500.0)}
    with torch.no_grad():
        part = model.cache_text(batch["y"], batch["mask"], batch_invariant=False).parts[0]
        table = model.cache_time(batch["timestep"])[0].blocks[0][None]
        arguments = (torch.randn(1, 6, 32), part.key_values[0], table, part.mask, (2, 3))
        compiled = torch.compile(model.blocks[0], backend="aot_eager", fullgraph=True)
        assert_rms_close(compiled(*arguments), model.blocks[0](*arguments))
