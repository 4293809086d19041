"""Which layers become fp8, what they compute, what stays exact, and every refusal."""

import copy

import pytest
import torch
from torch import nn

from sana.models.quantization.fp8 import Fp8Linear, Fp8MixFFN, quantize_fp8
from sana.models.transformer.sana import SanaMS
from sana.models.transformer.sana_cm import SanaMSCM
from sana.ops.fp8.function import Fp8UnavailableError, fp8_linear
from sana.ops.fp8.reference import dequantize_rows, quantize_rows
from tests.models.transformer.networks import inputs, small
from tests.tolerance import assert_rms_close, rms_ratio

NAMES = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj")
CONVOLUTIONS = ("mlp.inverted_conv", "mlp.point_conv")


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs())


def round_weights(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Rounds the weights of the named layers to e4m3 and the inputs of these layers, by hooks."""

    def round_input(module, args):
        rows = dequantize_rows(quantize_rows(args[0].reshape(-1, args[0].shape[-1])))
        return (rows.reshape(args[0].shape),)

    for name in names:
        layer = model.get_submodule(name)
        layer.weight.data = dequantize_rows(quantize_rows(layer.weight.data))
        layer.register_forward_pre_hook(round_input)
    return model


@pytest.mark.parametrize("kind", [SanaMS, SanaMSCM])
def test_names_and_counts(kind):
    model = small(kind, **({"cfg_embed": True} if kind is SanaMSCM else {}))
    before = {name: type(module) for name, module in model.named_modules()}
    replaced = quantize_fp8(model, backend="reference")
    assert replaced == tuple(f"blocks.{i}.{name}" for i in (0, 1) for name in (*NAMES, *CONVOLUTIONS))
    found = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert found == set(replaced)
    fp8 = (Fp8Linear, Fp8MixFFN)
    after = {name: type(module) for name, module in model.named_modules() if not isinstance(module, fp8)}
    assert after.items() <= before.items()
    assert isinstance(model.blocks[0].cross_attn.kv_linear, nn.Linear)
    assert isinstance(model.final_layer.linear, nn.Linear)


def test_some_blocks_stay_exact():
    model = small()
    replaced = quantize_fp8(model, backend="reference", skip_blocks=(0,))
    assert {name.split(".")[1] for name in replaced} == {"1"}
    assert not any(isinstance(module, Fp8Linear) for module in model.blocks[0].modules())


def test_both_layers_of_a_plain_mlp():
    model = small(ffn_type="mlp")
    assert set(quantize_fp8(model, backend="reference")) >= {"blocks.0.mlp.fc1", "blocks.1.mlp.fc2"}
    expected = round_weights(small(ffn_type="mlp"), quantize_names(model))
    assert_rms_close(run(model), run(expected))


def quantize_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, Fp8Linear))


def test_a_linear_layer_of_each_kind_rounds_weight_and_input():
    layer, x = nn.Linear(32, 48), torch.randn(2, 5, 32)
    fp8 = Fp8Linear(layer.weight, layer.bias, "reference")
    expected = round_weights(nn.Sequential(copy.deepcopy(layer)), ("0",))(x)
    assert_rms_close(fp8(x), expected)
    assert not fp8.fp8_scale.requires_grad and not list(fp8.parameters())


def test_the_mix_ffn_is_the_exact_one_between_rounded_products():
    exact, grid = small().blocks[0].mlp, (3, 4)
    fp8, x = Fp8MixFFN(exact, "reference"), torch.randn(2, 12, 32)
    expanded = fp8_linear(
        x, quantize_rows(exact.inverted_conv.conv.weight.flatten(1)), exact.inverted_conv.conv.bias, backend="reference"
    )
    image = torch.nn.functional.silu(expanded).transpose(1, 2).unflatten(2, grid)
    value, gate = exact.depth_conv(image).chunk(2, dim=1)
    hidden = (value * torch.nn.functional.silu(gate)).flatten(2).transpose(1, 2)
    expected = fp8_linear(hidden, quantize_rows(exact.point_conv.conv.weight.flatten(1)), backend="reference")
    with torch.no_grad():
        assert_rms_close(fp8(x, grid), expected)


def test_the_whole_model_is_near_but_not_equal():
    model = small()
    exact = run(model)
    quantize_fp8(model, backend="reference")
    assert 1e-3 < rms_ratio(run(model), exact) < 0.3


def test_perturbed_rows_take_the_rounded_value():
    model, perturbed = small(), {"pag_layers": (0, 1), "pag_rows": 1}
    quantize_fp8(model, backend="reference")
    plain, x = run(model), torch.randn(2, 6, 32)
    with torch.no_grad():
        mixed = model(**inputs(), **perturbed)
        attention = model.blocks[0].attn
        value = attention.qkv(x)[..., 64:]
        assert_rms_close(attention(x, identity_rows=2), attention.proj(value))
    assert_rms_close(mixed[0], plain[0])
    assert rms_ratio(mixed[1], plain[1]) > 1e-2


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_moving_to_another_dtype_keeps_the_numbers(device):
    layer = Fp8Linear(torch.randn(16, 32), torch.randn(16), "reference")
    before = [part.clone() for part in layer.parts]
    layer.to(torch.bfloat16).to(device)
    values, scale = layer.parts
    assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert layer.bias.dtype == torch.bfloat16
    assert values.device.type == scale.device.type == layer.bias.device.type == device
    if device == "cpu":
        assert torch.equal(values.view(torch.uint8), before[0].view(torch.uint8)) and torch.equal(scale, before[1])
        assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_state_of_a_quantised_model_fits_none_but_its_like():
    model, exact = small(), small()
    stored = exact.state_dict()
    quantize_fp8(model, backend="reference")
    state = model.state_dict()
    assert state["blocks.0.attn.qkv.fp8_values"].dtype == torch.float8_e4m3fn
    for network, weights in ((model, stored), (exact, state)):
        with pytest.raises(RuntimeError, match="Missing key"):
            network.load_state_dict(weights)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied), run(model))


@pytest.mark.parametrize("backend", ["triton", "scaled_mm"])
def test_devices_without_fp8_are_refused_and_nothing_is_replaced(backend):
    model = small()
    exact = run(model)
    with pytest.raises(Fp8UnavailableError, match="backend='reference'"):
        quantize_fp8(model, backend=backend)
    assert not quantize_names(model)
    assert torch.equal(run(model), exact)


def test_other_refusals_replace_nothing():
    cases = [
        (small(), {"backend": "int8"}, "Unknown fp8 backend 'int8'"),
        (small(), {"skip_blocks": (2,)}, "skip_blocks must be indices from 0 to 1"),
        (small(ffn_type="mbconvpreglu"), {}, "blocks.0.mlp is PreGluMBConv"),
        (small(mlp_ratio=1.25), {}, "blocks.0.mlp: fp8 needs widths that are multiples of 16, and 40 is none"),
        (nn.Linear(4, 4), {}, "Linear has no blocks"),
    ]
    for model, options, words in cases:
        with pytest.raises(ValueError, match=words):
            quantize_fp8(model, **{"backend": "reference", **options})
        assert not quantize_names(model)
    with torch.device("meta"):
        empty = SanaMS(**small().init_kwargs)
    with pytest.raises(ValueError, match="has no weights yet"):
        quantize_fp8(empty, backend="reference")
    twice = small()
    quantize_fp8(twice, backend="reference")
    with pytest.raises(ValueError, match="quantised to fp8 already"):
        quantize_fp8(twice, backend="reference")


@pytest.mark.gpu
def test_gpu_model_equals_its_reference():
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs compute capability 9.x or 10.x")
    outputs = {}
    for backend in ("triton", "scaled_mm", "reference"):
        model = small().to("cuda", torch.bfloat16)
        quantize_fp8(model, backend=backend)
        with torch.no_grad():
            outputs[backend] = model(**{name: tensor.cuda() for name, tensor in inputs().items()})
    for backend in ("triton", "scaled_mm"):  # bfloat16 moves some numbers across a border of e4m3, 16 times coarser
        assert rms_ratio(outputs[backend], outputs["reference"]) < 5e-2
