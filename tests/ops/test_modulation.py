"""adaLN in plain PyTorch and its Triton kernels: formulas in float64, every gradient, odd sizes, slices of tables."""

import pytest
import torch
from torch import Tensor

from sana import ops
from sana.ops.modulation import function
from sana.ops.modulation.reference import gated_residual_reference, modulated_layer_norm_reference
from tests.ops.kernels import DEVICE, assert_batch_invariant, assert_close_to_judge, assert_deterministic
from tests.tolerance import assert_rms_close

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
SHAPES = [(2, 9, 24), (1, 1, 1), (1, 131, 5), (2, 5, 600)]  # (B, N, D); more tokens than partial sums; two tiles of D


def draw_norm(shape: tuple[int, int, int], dtype: torch.dtype, rows: int | None = None) -> dict[str, Tensor]:
    """x with a mean of its own, and shift and scale cut out of one table as in a block."""
    images, tokens, width = shape
    table = torch.randn(rows or images, 6, width, device=DEVICE).to(dtype)
    x = torch.randn(images, tokens, width, device=DEVICE) * 2 + 1
    return {"x": x.to(dtype), "shift": table[:, 0:1], "scale": table[:, 1:2]}


def draw_gated(shape: tuple[int, int, int], dtype: torch.dtype, rows: int | None = None) -> dict[str, Tensor]:
    images, tokens, width = shape
    x, y = torch.randn(2, images, tokens, width, device=DEVICE).to(dtype)
    return {"x": x, "gate": torch.randn(rows or images, 6, width, device=DEVICE).to(dtype)[:, 2:3], "y": y}


def layer_norm(**inputs: Tensor) -> Tensor:
    return ops.modulated_layer_norm(**inputs, backend="triton")


def gated(**inputs: Tensor) -> Tensor:
    return ops.gated_residual(**inputs, backend="triton")


OPERATORS = {
    "modulated_layer_norm": (layer_norm, modulated_layer_norm_reference, draw_norm, ("x", "shift", "scale")),
    "gated_residual": (gated, gated_residual_reference, draw_gated, ("x", "gate", "y")),
}


def test_the_judge_of_the_norm_is_the_formula() -> None:
    inputs = draw_norm((2, 5, 12), torch.float64)
    x, shift, scale = inputs.values()
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    assert_rms_close(modulated_layer_norm_reference(**inputs), expected)


def test_the_judge_of_the_gate_is_the_formula() -> None:
    inputs = draw_gated((2, 5, 12), torch.float64)
    assert_rms_close(gated_residual_reference(**inputs), inputs["x"] + inputs["gate"] * inputs["y"])


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_backend_of_a_cpu_equals_the_judge(name: str, rows: int | None) -> None:
    _, judge, draw, _ = OPERATORS[name]
    inputs = {key: tensor.cpu() for key, tensor in draw((2, 9, 24), torch.float32, rows).items()}
    with torch.no_grad():
        for backend in ("auto", "reference", "cpu"):
            assert_rms_close(getattr(ops, name)(**inputs, backend=backend), judge(**inputs), what=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernel_equals_the_judge(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    fast, judge, draw, _ = OPERATORS[name]
    inputs = draw(shape, dtype)
    if shape[-1] == 1:  # the variance of one value is 0, and so are its gradients
        inputs |= {"x": inputs["x"] * 0 + 1}
        assert_close_to_judge(fast, judge, inputs, backward=False)
    else:
        assert_close_to_judge(fast, judge, inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_one_row_serves_the_whole_batch(name: str) -> None:
    fast, judge, draw, _ = OPERATORS[name]
    assert_close_to_judge(fast, judge, draw((3, 5, 16), torch.float32, 1))


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_tokens_are_read_in_place(name: str) -> None:
    fast, judge, draw, _ = OPERATORS[name]
    inputs = draw((2, 5, 16), torch.float32)
    wide = torch.randn(2, 10, 40, device=DEVICE)
    assert_close_to_judge(fast, judge, inputs | {"x": wide[:, ::2, 8:24]})
    assert_close_to_judge(fast, judge, inputs | {"x": torch.randn(2, 16, 5, device=DEVICE).transpose(1, 2)})


@pytest.mark.parametrize("name", OPERATORS)
def test_runs_are_deterministic_and_images_independent(name: str) -> None:
    fast, _, draw, batched = OPERATORS[name]
    inputs = draw((2, 10, 16), torch.float32)
    assert_deterministic(fast, inputs)
    assert_batch_invariant(fast, inputs, batched)


@pytest.mark.parametrize("name", OPERATORS)
def test_tables_may_be_wider_than_the_tokens(name: str) -> None:
    fast, judge, draw, tables = OPERATORS[name]
    inputs = draw((2, 5, 16), torch.float16)
    mixed = inputs | {key: inputs[key].float() for key in tables if key not in ("x", "y")}
    assert_close_to_judge(fast, judge, mixed)


def test_what_does_not_fit_is_refused() -> None:
    x, row = torch.zeros(2, 5, 16, device=DEVICE), torch.zeros(2, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"shift must be \(1, 1, 16\) or \(2, 1, 16\), not \(2, 5, 16\)"):
        layer_norm(x=x, shift=x, scale=row)
    with pytest.raises(ValueError, match=r"gate must be \(1, 1, 16\) or \(2, 1, 16\), not \(3, 1, 16\)"):
        gated(x=x, gate=torch.zeros(3, 1, 16, device=DEVICE), y=x)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, not torch.float64"):
        layer_norm(x=x.double(), shift=row, scale=row)
    with pytest.raises(ValueError, match=r"y must be like x, \(2, 5, 16\)"):
        gated(x=x, gate=row, y=x[:1])
    with pytest.raises(ValueError, match=r"x must be \(B, N, D\), not empty"):
        layer_norm(x=x[:, :0], shift=row, scale=row)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiler_keeps_the_graph_whole(name: str) -> None:
    _, judge, draw, _ = OPERATORS[name]
    inputs, fast = draw((2, 5, 16), torch.float32), getattr(function, f"{name}_triton")
    compiled = torch.compile(lambda **kwargs: fast(**kwargs) * 2, backend="aot_eager", fullgraph=True)
    assert_close_to_judge(compiled, lambda **kwargs: judge(**kwargs) * 2, inputs)
    with torch.no_grad():
        assert_rms_close(compiled(**inputs), judge(**inputs) * 2)
