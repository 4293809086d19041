"""The quantised layer as a module: what it keeps, how it moves; and the Mix-FFN that takes any linear layers."""

import copy

import pytest
import torch
from torch import nn

from sana.models.quantization import linear as linear_module
from sana.models.quantization.kernels import KERNELS
from sana.models.quantization.linear import QuantizedLinear, QuantizedMixFFN
from sana.models.quantization.schemes import SCHEMES, quantized_bytes
from sana.models.transformer.mix_ffn import MixFFN
from tests.tolerance import assert_rms_close, rms_ratio

ON_CPU = ("int8", "int8-dynamic", "nf4")


def layer_of(scheme: str, exact: nn.Linear) -> QuantizedLinear:
    return QuantizedLinear.from_weight(scheme, exact.weight, exact.bias)


def mix_ffn(dilation: int = 1, dtype: torch.dtype = torch.float32, **options: object) -> MixFFN:
    return MixFFN(16, 24, dilation=dilation, **options).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("scheme", ON_CPU)
def test_it_holds_what_the_table_says_and_nothing_else(scheme):
    exact = nn.Linear(64, 96)
    layer = layer_of(scheme, exact)
    assert layer.weight_bytes == quantized_bytes(exact.weight.shape, scheme, torch.float32)
    held = sum(tensor.untyped_storage().nbytes() for tensor in layer.state_dict().values())
    assert held == layer.weight_bytes + exact.bias.nbytes
    assert not list(layer.parameters()) and not any(buffer.requires_grad for buffer in layer.buffers())
    name = scheme.replace("-", "_")
    assert all(key == "bias" or key.startswith(f"{name}_") for key in layer.state_dict())


@pytest.mark.parametrize("scheme", ON_CPU)
def test_it_equals_its_kernel(scheme):
    exact, x = nn.Linear(64, 96), torch.randn(2, 5, 64)
    layer = layer_of(scheme, exact)
    with torch.no_grad():
        expected = KERNELS[scheme].multiply(x, KERNELS[scheme].pack(exact.weight), (96, 64), exact.bias)
        assert torch.equal(layer(x), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("scheme", ON_CPU)
def test_another_dtype_changes_the_bias_only(scheme):
    layer = layer_of(scheme, nn.Linear(64, 96))
    before = [part.clone() for part in layer.parts]
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for old, new in zip(before, layer.parts, strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype
    with torch.no_grad():
        assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_another_device_moves_everything():
    layer = layer_of("int8", nn.Linear(64, 96)).to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_an_empty_one_has_the_keys_and_shapes_of_a_full_one(scheme):
    exact = nn.Linear(64, 96)
    empty = QuantizedLinear.empty(scheme, exact.weight, exact.bias)
    assert empty.weight_bytes == quantized_bytes(exact.weight.shape, scheme, torch.float32)
    assert all(part.is_meta for part in empty.parts)
    if not KERNELS[scheme].pack_on:
        full = layer_of(scheme, exact).state_dict()
        assert {key: (one.shape, one.dtype) for key, one in empty.state_dict().items()} == {
            key: (one.shape, one.dtype) for key, one in full.items()
        }


def test_a_shape_that_the_scheme_cannot_store_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        layer_of("fp8", nn.Linear(20, 16))
    with pytest.raises(ValueError, match="multiple of 32"):
        QuantizedLinear.empty("int4", nn.Linear(40, 16).weight, None)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("acts", [("silu", "silu", None), (None, "gelu", "silu")])
def test_the_mix_ffn_over_tokens_is_the_exact_one(dilation, acts):
    exact, x = mix_ffn(dilation, acts=acts), torch.randn(2, 12, 16)
    with torch.no_grad():
        assert_rms_close(QuantizedMixFFN(exact)(x, (3, 4)), exact(x, (3, 4)))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("grid", [(16, 5), (17, 3), (9, 8)])
@pytest.mark.parametrize("rows", [2, 4, 5])
def test_a_large_image_in_parts_is_the_whole_one(dilation, grid, rows, monkeypatch):
    network, x = QuantizedMixFFN(mix_ffn(dilation)), torch.randn(2, grid[0] * grid[1], 16)
    network.inverted_conv = layer_of("int8", nn.Linear(16, 48).requires_grad_(False))
    with torch.no_grad():
        whole = network(x, grid)
        monkeypatch.setattr(linear_module, "chunk_rows", lambda *_: rows)
        seen: list[int] = []
        network.inverted_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1] // grid[1]))
        parts = network(x, grid)
    assert_rms_close(parts, whole)
    assert max(seen) <= rows + 2 * dilation and len(seen) == 2 * -(-grid[0] // rows)


def test_a_mix_ffn_with_quantised_products_is_near_the_exact_one():
    exact, x = mix_ffn(), torch.randn(2, 12, 16)
    network = QuantizedMixFFN(exact)
    for name in ("inverted_conv", "point_conv"):
        setattr(network, name, QuantizedLinear.from_weight("int8", *getattr(exact, name).weight_bias))
    with torch.no_grad():
        assert 1e-4 < rms_ratio(network(x, (3, 4)), exact(x, (3, 4))) < 2e-2
    assert network.depth_conv is exact.depth_conv
