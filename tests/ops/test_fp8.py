"""e4m3 rows against a table of all e4m3 numbers, the linear layer against float64, refusals, and the kernel."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana.ops.fp8 import function
from sana.ops.fp8.function import Fp8UnavailableError, fp8_linear, gated_convolution, require_fp8, scaled_product
from sana.ops.fp8.reference import FP8_MAX, Fp8Rows, dequantize_rows, quantize_rows
from tests.ops.kernels import nan_memory
from tests.tolerance import assert_rms_close, rms_ratio

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def e4m3_numbers() -> Tensor:
    """Returns every finite e4m3 number by the format's definition: sign, exponent of bias 7, mantissa of 3 bits."""
    positive = [mantissa / 8 * 2**-6 for mantissa in range(8)]
    positive += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    positive.pop()  # the last code is NaN
    assert positive[-1] == FP8_MAX
    return torch.tensor(positive + [-one for one in positive], dtype=torch.float64)


def test_every_number_becomes_the_nearest_of_the_format() -> None:
    x = draw(6, 80) * torch.logspace(-3, 3, 80)
    rows = quantize_rows(x)
    scaled = x.double() / rows.scale.double()
    nearest = (scaled[..., None] - e4m3_numbers()).abs().amin(dim=-1)
    error = (scaled - rows.values.double()).abs()
    assert torch.isin(rows.values.double(), e4m3_numbers()).all()
    assert (error <= nearest + 1e-6 * scaled.abs()).all()
    assert torch.equal(rows.values.float().abs().amax(dim=1), torch.full((6,), FP8_MAX))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_relative_error_of_a_number(magnitude: float) -> None:
    x = draw(8, 256, seed=1) * magnitude
    rows = quantize_rows(x)
    error = (dequantize_rows(rows).double() - x.double()).abs()
    scale = rows.scale.double()
    normal = x.double().abs() >= scale * 2**-6
    assert 0 < normal.double().mean() <= 1
    assert (error <= x.double().abs() * 2**-4 * (1 + 1e-6))[normal].all()
    assert (error <= scale * 2**-10 * (1 + 1e-6))[~normal].all()


def test_a_row_of_zeros_stays_zero() -> None:
    x = draw(3, 32)
    x[1] = 0
    weight, bias = quantize_rows(draw(16, 32, seed=1)), draw(16, seed=2)
    assert torch.equal(dequantize_rows(quantize_rows(x))[1], torch.zeros(32))
    assert torch.equal(fp8_linear(x, weight, bias, backend="reference")[1], bias)


def test_tiny_rows_keep_finite_numbers() -> None:
    x = torch.full((2, 16), 1e-42)
    rows = quantize_rows(x)
    assert torch.isfinite(rows.scale).all() and torch.isfinite(rows.values.float()).all()
    assert (dequantize_rows(rows) - x).abs().max() <= torch.finfo(torch.float32).tiny


def test_an_outlier_costs_its_own_row_only() -> None:
    x = draw(4, 64)
    calm = quantize_rows(x)
    x[2, 5] = 3e30
    rows = quantize_rows(x)
    assert dequantize_rows(rows)[2, 5].item() == pytest.approx(3e30, rel=1e-6)
    others = [0, 1, 3]
    assert torch.equal(rows.values[others].float(), calm.values[others].float())
    assert torch.equal(rows.scale[others], calm.scale[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row_and_no_other(bad: float) -> None:
    x = draw(4, 32)
    x[1, 7] = bad
    out = fp8_linear(x, quantize_rows(draw(16, 32, seed=1)), backend="reference")
    assert not torch.isfinite(out[1]).any()
    assert torch.isfinite(out[[0, 2, 3]]).all()


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
def test_the_reference_is_the_product_of_the_rounded_matrices(shape: tuple[int, ...]) -> None:
    x, weight, bias = draw(*shape), quantize_rows(draw(48, 32, seed=1)), draw(48, seed=2)
    rounded = dequantize_rows(quantize_rows(x.reshape(-1, 32))).double()
    expected = (rounded @ dequantize_rows(weight).double().t() + bias.double()).reshape(*shape[:-1], 48)
    out = fp8_linear(x, weight, bias, backend="reference")
    assert out.dtype == x.dtype
    assert_rms_close(out, expected.float())


def test_the_error_of_a_product_is_that_of_three_bits() -> None:
    x, weight = draw(64, 256), draw(96, 256, seed=1)
    ratio = rms_ratio(fp8_linear(x, quantize_rows(weight), backend="reference"), x @ weight.t())
    assert 0.02 < ratio < 0.05  # about 2.6 % from each matrix


def test_rows_do_not_depend_on_one_another() -> None:
    x, weight = draw(5, 32), quantize_rows(draw(16, 32, seed=1))
    whole = quantize_rows(x)
    for row in range(5):
        alone = quantize_rows(x[row : row + 1])
        assert torch.equal(alone.values.float()[0], whole.values.float()[row])
        assert torch.equal(alone.scale[0], whole.scale[row])
    assert weight.scale.shape == (16, 1)


def test_layouts_of_the_scaled_product() -> None:
    """PyTorch multiplies e4m3 on the CPU with one scale a matrix only: enough to judge layouts, dtype and bias."""
    x, weight, bias = quantize_rows(draw(6, 32)), quantize_rows(draw(48, 32, seed=1)), draw(48, seed=2)
    one = [Fp8Rows(rows.values, torch.full((1, 1), scale)) for rows, scale in ((x, 0.01), (weight, 0.02))]
    out = scaled_product(one[0], one[1], bias)
    expected = (x.values.double() @ weight.values.double().t()) * 0.0002 + bias.double()
    assert out.dtype == torch.bfloat16
    assert_rms_close(out, expected.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["triton", "scaled_mm"])
def test_a_cpu_is_refused(backend: str) -> None:
    with pytest.raises(Fp8UnavailableError, match="9.x or 10.x.*this is device 'cpu'.*backend='reference'"):
        fp8_linear(draw(2, 16), quantize_rows(draw(16, 16)), backend=backend)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(Fp8UnavailableError, match=f"this one has {capability[0]}.{capability[1]}"):
        require_fp8(CUDA)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_hopper_and_blackwell_are_accepted(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    require_fp8(CUDA)


def test_arguments_that_do_not_fit() -> None:
    weight = quantize_rows(draw(16, 32))
    with pytest.raises(ValueError, match="Unknown fp8 backend 'auto'; known: triton, scaled_mm, reference"):
        fp8_linear(draw(2, 32), weight, backend="auto")
    with pytest.raises(ValueError, match="rows of 16 numbers and the weight takes 32"):
        fp8_linear(draw(2, 16), weight, backend="reference")
    with pytest.raises(ValueError, match="multiples of 16, and 24 is none"):
        fp8_linear(draw(2, 24), quantize_rows(draw(16, 24)), backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [16, 48, 224])
def test_the_kernel_finds_the_scales_and_nearly_the_numbers(dtype: torch.dtype, width: int) -> None:
    """The interpreter cuts e4m3 and loses the carry into the exponent, so that a number may lose half of itself: this
    judges rows, columns and scales. A GPU is held to the bit below."""
    pytest.importorskip("triton")
    from sana.ops.fp8.forward import quantize_rows_triton

    x = (draw(5, 2 * width) * torch.logspace(-3, 2, 5)[:, None]).to(dtype)[:, :width]  # rows apart in memory
    x[1] = 0
    actual, expected = quantize_rows_triton(x), quantize_rows(x)
    assert torch.equal(actual.scale, expected.scale)
    error = (dequantize_rows(actual) - x.float()).abs()
    assert (error <= x.float().abs() * 0.5 + actual.scale * 2**-6).all()


def test_the_kernel_shows_nan_in_the_scale() -> None:
    pytest.importorskip("triton")
    from sana.ops.fp8.forward import quantize_rows_triton

    x = draw(3, 32)
    x[1, 4] = math.nan
    scale = quantize_rows_triton(x).scale.flatten()
    assert scale.isnan().tolist() == [False, True, False]


def test_the_kernel_refuses_columns_that_are_apart() -> None:
    pytest.importorskip("triton")
    from sana.ops.fp8.forward import quantize_rows_triton

    with pytest.raises(ValueError, match="contiguous rows of at most 16384"):
        quantize_rows_triton(draw(16, 32).t())


def test_the_gated_convolution_is_that_of_pytorch() -> None:
    pytest.importorskip("triton")
    x, weight, bias = draw(2, 15, 32), draw(32, 1, 3, 3, seed=1), draw(32, seed=2)
    image = x.transpose(1, 2).unflatten(2, (3, 5))
    value, gate = F.conv2d(image, weight, bias, padding=1, groups=32).chunk(2, dim=1)
    expected = (value * F.silu(gate)).flatten(2).transpose(1, 2)
    with nan_memory():
        assert_rms_close(gated_convolution(x, (3, 5), weight, bias), expected)
    with pytest.raises(ValueError, match="must be \\(2M, 1, 3, 3\\)"):
        gated_convolution(x, (3, 5), draw(32, 1, 5, 5), bias)


COMPILE = """
import json
from sana.ops.fp8.forward import quantize_rows_kernel
from tests.ops.compile_gate import compile_spec
from tests.ops.kernels import Spec
signature = {"x_ptr": "*bf16:16", "values_ptr": "*fp8e4nv:16", "scale_ptr": "*fp32:16", "width": "i32:16",
             "row_stride": "i32:16", "smallest": "fp32"}
specs = [Spec("fp8", quantize_rows_kernel, signature, {"BLOCK": block}) for block in (2048, 8192)]
print(json.dumps([compile_spec(spec, architecture) for spec in specs for architecture in (90, 100)]))
"""


def test_the_kernel_compiles_where_e4m3_exists() -> None:
    """Apart from `tests/ops/test_compile.py`, whose architectures include Ampere, which has no e4m3."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [result["error"] for result in results] == [None] * 4
    assert all(result["cubin"] > 0 for result in results)


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in function.CAPABILITIES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 1152, 5600])
def test_gpu_kernel_equals_the_reference_to_the_bit(dtype: torch.dtype, width: int) -> None:
    if not hopper():
        pytest.skip("needs compute capability 9.x or 10.x")
    from sana.ops.fp8.forward import quantize_rows_triton

    x = (draw(77, width) * torch.logspace(-3, 2, 77)[:, None]).to(CUDA, dtype)
    x[3] = 0
    actual, expected = quantize_rows_triton(x), quantize_rows(x)
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "scaled_mm"])
@pytest.mark.parametrize("rows", [1, 77, 257, 1024])
def test_gpu_product_equals_the_reference(backend: str, rows: int) -> None:
    if not hopper():
        pytest.skip("needs compute capability 9.x or 10.x")
    x = draw(rows, 1152).to(CUDA, torch.bfloat16)
    weight, bias = quantize_rows(draw(336, 1152, seed=1).to(CUDA)), draw(336, seed=2).to(CUDA, torch.bfloat16)
    for offset in (None, bias):
        actual = fp8_linear(x, weight, offset, backend=backend)
        assert_rms_close(actual, fp8_linear(x.float(), weight, offset, backend="reference"), torch.bfloat16)
    assert actual.dtype == x.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "scaled_mm"])
def test_gpu_nan_shows_in_its_row_and_no_other(backend: str) -> None:
    if not hopper():
        pytest.skip("needs compute capability 9.x or 10.x")
    x = draw(4, 32).to(CUDA, torch.bfloat16)
    x[1, 7] = math.nan
    out = fp8_linear(x, quantize_rows(draw(16, 32, seed=1).to(CUDA)), backend=backend)
    assert not torch.isfinite(out[1]).any()
    assert torch.isfinite(out[[0, 2, 3]]).all()
