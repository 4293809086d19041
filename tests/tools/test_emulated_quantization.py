"""The emulated schemes against torchao's own numbers and products, `sana.ops.fp8`, and the layers of `quantize`."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from sana.models.quantization.apply import choose_layers
from sana.models.quantization.kernels import int4_values
from sana.models.quantization.schemes import SCHEMES, group_size, quantized_bytes
from sana.ops.fp8.reference import dequantize_rows, fp8_linear_reference, quantize_rows
from sana.pipelines.sana_pipeline import SanaPipeline
from tests.tolerance import assert_rms_close, rms_ratio
from tools.emulated_quantization import EMULATED, EmulatedLinear, emulate, emulated_bytes, int4_weight

MODEL = "asset/models/sana_tiny"
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install it")


@needs_torchao
@pytest.mark.parametrize(("rows", "width"), [(48, 128), (16, 96), (8, 32)])
def test_int4_weights_are_torchaos_own_bit_for_bit(rows, width):
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

    weight, group = torch.randn(rows, width), group_size(width, SCHEMES["int4"])
    values, scale_and_zero = int4_values(weight)
    scale, zero = (scale_and_zero[..., i].t().contiguous() for i in (0, 1))
    theirs = _dequantize_affine_tinygemm(
        values, (1, group), scale, zero, torch.int32, 0, 15, output_dtype=torch.bfloat16
    )
    mine = int4_weight(weight)
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)
    step = scale.float().repeat_interleave(group, dim=1)
    assert ((mine.float() - weight).abs() <= step).all()  # half, and what scales and products lose in bfloat16


@needs_torchao
def test_int4_products_are_those_of_pytorchs_kernel_for_cpus():
    """That kernel reads the same numbers in another order; it adds up in float32 and gives bfloat16."""
    layer, x = torch.nn.Linear(128, 48), torch.randn(5, 128).bfloat16()
    values, scale_and_zero = int4_values(layer.weight.detach())
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    expected = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scale_and_zero)
    mine = EmulatedLinear("int4", layer.weight, None)(x)
    assert_rms_close(mine, expected)
    biased = EmulatedLinear("int4", layer.weight, layer.bias.detach().bfloat16())(x)
    assert torch.equal(biased, mine + layer.bias.detach().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_the_reference_of_the_kernels(dtype):
    layer, x = torch.nn.Linear(64, 32), torch.randn(2, 3, 64).to(dtype)
    weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    emulated = EmulatedLinear("fp8", weight, bias)
    assert torch.equal(emulated(x), fp8_linear_reference(x, quantize_rows(weight), bias))
    rounded = F.linear(
        dequantize_rows(quantize_rows(x.reshape(-1, 64))), dequantize_rows(quantize_rows(weight)), bias.float()
    )
    assert_rms_close(emulated(x), rounded.to(dtype).view(2, 3, 32))
    assert 1e-3 < rms_ratio(emulated(x), F.linear(x, weight, bias)) < 0.1


@needs_torchao
@pytest.mark.parametrize("scheme", EMULATED)
def test_the_layers_are_those_of_quantize(scheme):
    keep = ("*.mlp.point_conv",) if scheme == "int4" else ()
    network = SanaPipeline.from_pretrained(MODEL, device="cpu", dtype="bf16").transformer
    chosen = choose_layers(network, "transformer", scheme, keep)
    before = sum(one.nbytes for one in (*network.parameters(), *network.buffers()))
    shapes = [network.get_submodule(name) for name in chosen]
    shapes = [getattr(layer, "conv", layer).weight.shape for layer in shapes]
    assert emulate(network, scheme, keep) == chosen
    layers = {name: one for name, one in network.named_modules() if isinstance(one, EmulatedLinear)}
    assert set(layers) == set(chosen)
    saved = sum(2 * shape.numel() - quantized_bytes(shape, scheme, torch.bfloat16) for shape in shapes)
    assert emulated_bytes(network) == before - saved


def test_other_schemes_and_widths_are_refused():
    with pytest.raises(ValueError, match="int4 and fp8"):
        EmulatedLinear("int8", torch.randn(16, 32), None)
    with pytest.raises(ValueError, match="multiple of 32"):
        EmulatedLinear("int4", torch.randn(16, 48), None)
    with pytest.raises(ValueError, match="multiple of 16"):
        EmulatedLinear("fp8", torch.randn(16, 24), None)
