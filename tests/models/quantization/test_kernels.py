"""What each scheme stores and computes, judged by torchao's and bitsandbytes' own layers and by formulas."""

import importlib.util

import pytest
import torch
from torch import nn

from sana.models.quantization import kernels
from sana.models.quantization.kernels import (
    KERNELS,
    QuantizationUnavailableError,
    int4_tiles,
    int4_values,
    pack,
    require,
)
from sana.models.quantization.schemes import SCHEMES, quantized_bytes
from tests.tolerance import rms_ratio

CPU = torch.device("cpu")
SHAPE = (96, 64)
ON_CPU = ("int8", "int8-dynamic", "nf4")


def weight(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def product(name: str, x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return KERNELS[name].multiply(x, pack(name, exact), tuple(exact.shape), bias)


@pytest.mark.parametrize("name", [*ON_CPU, "fp8"])
@pytest.mark.parametrize("shape", [SHAPE, (128, 224), (16, 80)])
def test_stored_tensors_are_what_the_specs_and_the_table_say(name, shape):
    parts = pack(name, weight(shape=shape))
    assert tuple((tuple(part.shape), part.dtype) for part in parts) == KERNELS[name].specs(*shape)
    assert sum(part.nbytes for part in parts) == quantized_bytes(shape, name, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int8-dynamic"])
def test_int8_is_torchaos_own_layer_bit_for_bit(name, dtype):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    kind = Int8WeightOnlyConfig if name == "int8" else Int8DynamicActivationInt8WeightConfig
    exact, x = nn.Linear(SHAPE[1], SHAPE[0]).to(dtype), torch.randn(2, 5, SHAPE[1]).to(dtype)
    mine = product(name, x, exact.weight, exact.bias)
    theirs = nn.Sequential(exact)
    quantize_(theirs, kind(set_inductor_config=False))
    with torch.no_grad():
        assert torch.equal(mine, theirs(x))
    assert mine.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_own_layer_bit_for_bit(dtype):
    from bitsandbytes.nn import Linear4bit, Params4bit

    exact, x = weight(dtype), torch.randn(2, 5, SHAPE[1]).to(dtype)
    layer = Linear4bit(SHAPE[1], SHAPE[0], bias=False, quant_type="nf4", compute_dtype=dtype, compress_statistics=False)
    layer.weight = Params4bit(exact, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64)
    layer = layer.to("cpu")
    mine = product("nf4", x, exact)
    with torch.no_grad():
        assert torch.equal(mine, layer(x))


@pytest.mark.parametrize("width", [32, 48, 64, 80, 160, 224, 560, 1152, 2880, 5600])
@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_of_its_sixteen_levels_in_every_group(rows, width, dtype):
    """Also where groups run on from row to row, for which bitsandbytes' kernel for CPUs reads wrong scales."""
    from bitsandbytes.functional import get_4bit_type

    exact = weight(dtype, (rows, width))
    levels = get_4bit_type("nf4", device="cpu")
    size = next((size for size in (64, 32) if width % size == 0), 64)
    groups = torch.nn.functional.pad(exact.float().flatten(), (0, -rows * width % size)).view(-1, size)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    nearest = levels[((groups / largest)[..., None] - levels).abs().argmin(dim=-1)] * largest
    expected = nearest.flatten()[: rows * width].view(rows, width)
    found = product("nf4", torch.eye(width, dtype=dtype), exact).T
    assert rms_ratio(found.float(), expected) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_int8_rounds_each_row_to_its_own_scale():
    exact = weight()
    scale = exact.abs().amax(dim=1, keepdim=True) / 127.5
    values, stored = pack("int8", exact)
    assert torch.allclose(stored, scale)
    assert ((values * scale - exact).abs() <= scale * 0.5001).all()  # the nearest of 256 steps


@pytest.mark.parametrize(("name", "limit"), [("int8", 0.01), ("int8-dynamic", 0.02), ("nf4", 0.12), ("fp8", 0.05)])
def test_a_product_is_near_the_exact_one(name, limit, monkeypatch):
    if name == "fp8":  # its GPU kernel, stood in for by the reference
        monkeypatch.setattr(kernels, "fp8_linear", lambda *args, backend: fp8_reference(*args))
    exact, x = weight(shape=(256, 512)), torch.randn(64, 512)
    error = rms_ratio(product(name, x, exact), x @ exact.T)
    assert limit / 20 < error < limit


def fp8_reference(*args: object) -> torch.Tensor:
    from sana.ops.fp8.function import fp8_linear

    return fp8_linear(*args, backend="reference")


@pytest.mark.parametrize("name", ON_CPU)
def test_a_row_does_not_depend_on_the_others(name):
    exact, x = weight(), torch.randn(7, SHAPE[1])
    whole = product(name, x, exact)
    for row in range(7):
        assert rms_ratio(product(name, x[row : row + 1], exact), whole[row : row + 1]) < 1e-6
    assert torch.equal(product(name, x[None].expand(3, -1, -1), exact)[1], whole) or name == "nf4"


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_added_and_the_dtype_kept(name, dtype):
    exact, x, bias = weight(dtype), torch.randn(3, SHAPE[1]).to(dtype), torch.randn(SHAPE[0]).to(dtype)
    with_bias, without = product(name, x, exact, bias), product(name, x, exact)
    assert with_bias.dtype == dtype
    assert rms_ratio(with_bias.float(), without.float() + bias.float()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("width", [1152, 2240, 2880, 5600])
def test_int4_rounds_each_group_between_its_ends_and_the_cpu_kernel_agrees(width):
    exact = weight(torch.bfloat16, (32, width))
    values, scale_and_zero = int4_values(exact)
    group = width // scale_and_zero.shape[0]
    scale, zero = (one.t()[..., None].float() for one in scale_and_zero.unbind(dim=-1))  # (N, K / group, 1)
    rounded = ((values.float() - 8).unflatten(1, (-1, group)) * scale + zero).flatten(1)
    grouped = exact.float().unflatten(1, (-1, group))
    step = (grouped.amax(dim=-1) - grouped.amin(dim=-1)) / 15
    assert int(values.min()) >= 0 and int(values.max()) <= 15
    error = (rounded - exact.float()).unflatten(1, (-1, group)).abs().amax(dim=-1)
    assert (error <= 0.5 * step + 0.02 * grouped.abs().amax(dim=-1)).all()  # scales and zeros are bfloat16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    x = torch.randn(5, width).to(torch.bfloat16)
    computed = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_zero)
    assert rms_ratio(computed.float(), x.float() @ rounded.T) < 5e-3


@pytest.mark.parametrize(("rows", "width"), [(3456, 1152), (6720, 2240), (1152, 2880), (2240, 5600)])
def test_int4_is_stored_without_padding(rows, width):
    nibbles = torch.empty(rows, width // 2, dtype=torch.uint8, device="meta")
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, int4_tiles(width))
    (shape, dtype), scales = KERNELS["int4"].specs(rows, width)
    assert (tuple(packed.shape), packed.dtype) == (shape, dtype)
    stored = sum(torch.empty(size, dtype=kind, device="meta").nbytes for size, kind in ((shape, dtype), scales))
    assert stored == quantized_bytes((rows, width), "int4", torch.bfloat16)


def test_devices_that_a_scheme_does_not_know_are_refused_by_name():
    words = r"int4 runs on CUDA devices of compute capability 8.0 or newer; this model is on cpu: use int8 or"
    with pytest.raises(QuantizationUnavailableError, match=words):
        require("int4", CPU)
    with pytest.raises(QuantizationUnavailableError, match=r"fp8 runs on CUDA.*9\.0 to 10\.x; this model is on cpu"):
        require("fp8", CPU)
    with pytest.raises(QuantizationUnavailableError, match="on mps: use no quantisation"):
        require("int8", torch.device("mps"))
    for name in ON_CPU:
        require(name, CPU)


@pytest.mark.parametrize(
    ("capability", "works"), [((7, 5), {"int8", "nf4"}), ((8, 6), {"int8", "int8-dynamic", "int4", "nf4"}),
                              ((9, 0), set(SCHEMES)), ((12, 0), {"int8", "int8-dynamic", "int4", "nf4"})]
)  # fmt: skip
def test_which_gpus_have_which_schemes(capability, works, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = set()
    for name in SCHEMES:
        try:
            require(name, torch.device("cuda"))
            found.add(name)
        except QuantizationUnavailableError as error:
            assert f"compute capability {capability[0]}.{capability[1]}" in str(error)
    assert found == works


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(QuantizationUnavailableError, match=rf"{name} needs {package}.*sana-python\[{package}\]"):
            require(name, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("shape", [(3456, 1152), (1152, 2880), (2240, 5600)])
def test_gpu_products_are_those_of_the_rounded_weight(name, shape):
    """Weights are packed on the CPU (int4: on the GPU); the product is compared with float32 on what is stored."""
    device = torch.device("cuda")
    try:
        require(name, device)
    except QuantizationUnavailableError as error:
        pytest.skip(str(error))
    exact = weight(torch.bfloat16, shape).to(device)
    x = torch.randn(2, 40, shape[1], device=device, dtype=torch.bfloat16)
    parts = pack(name, exact)
    assert tuple((tuple(part.shape), part.dtype) for part in parts) == KERNELS[name].specs(*shape)
    out = KERNELS[name].multiply(x, parts, shape, None)
    assert out.shape == (2, 40, shape[0]) and out.dtype == torch.bfloat16
    limit = {"int8": 0.01, "int8-dynamic": 0.03, "int4": 0.12, "nf4": 0.12, "fp8": 0.06}[name]
    assert rms_ratio(out.float(), x.float() @ exact.float().T) < limit
    if name == "int4":  # what the tiles hold is what was rounded
        values, scale_and_zero = int4_values(exact)
        group = shape[1] // scale_and_zero.shape[0]
        scale, zero = (one.t()[..., None].float() for one in scale_and_zero.unbind(dim=-1))
        rounded = ((values.float() - 8).unflatten(1, (-1, group)) * scale + zero).flatten(1)
        assert rms_ratio(out.float(), x.float() @ rounded.T) < 1e-2
