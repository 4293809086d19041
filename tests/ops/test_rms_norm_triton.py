"""The Triton RMS norm of image channels against the judge: layouts, activations, odd sizes, every gradient."""

import pytest
import torch
from torch import Tensor

from sana.ops.rms_norm import function
from sana.ops.rms_norm.function import rms_norm_2d
from sana.ops.rms_norm.reference import rms_norm_2d as judge
from tests.ops.kernels import DEVICE, assert_batch_invariant, assert_close_to_judge, assert_deterministic
from tests.tolerance import assert_rms_close

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EPS = 1e-5


def draw(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, Tensor]:
    """x and the norm's parameters; x is large in places, so that squares overflow in float16."""
    x = torch.randn(shape, device=DEVICE) * torch.linspace(0.1, 300, shape[3], device=DEVICE)
    channels = torch.randn(2, shape[1], device=DEVICE).to(dtype)
    return {"x": x.to(dtype).to(memory_format=layout), "weight": channels[0], "bias": channels[1]}


def bind(function, act: str | None, **options):
    def operator(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return function(x, weight, bias, EPS, act, **options)

    return operator


def fast(act: str | None = None):
    return bind(rms_norm_2d, act, backend="triton")


@pytest.mark.parametrize("act", [None, "silu", "relu"])
def test_the_judge_is_the_formula(act: str | None) -> None:
    inputs = {name: tensor.double() for name, tensor in draw((2, 6, 3, 4)).items()}
    x = inputs["x"].movedim(1, -1)
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * inputs["weight"] + inputs["bias"]
    expected = {None: normed, "silu": normed * normed.sigmoid(), "relu": normed.clamp(min=0)}[act].movedim(-1, 1)
    assert_rms_close(bind(judge, act)(**inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "act"),
    [((2, 24, 5, 7), None), ((1, 33, 3, 67), "silu"), ((1, 200, 2, 3), "relu"), ((3, 1, 1, 1), "silu")],
)
def test_the_kernel_equals_the_judge(
    shape: tuple[int, int, int, int], act: str | None, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    inputs = draw(shape, dtype, layout)
    if shape[1] == 1:  # the norm of one value is its sign: its gradient is eps, far below the terms that cancel in it
        assert_close_to_judge(fast(act), bind(judge, act), inputs, backward=False)
    else:
        assert_close_to_judge(fast(act), bind(judge, act), inputs)
    assert fast(act)(**inputs).stride() == inputs["x"].stride()


def test_channels_that_fill_no_tile() -> None:
    """More channels than one tile of the forward pass holds."""
    assert_close_to_judge(fast("silu"), bind(judge, "silu"), draw((1, 4100, 1, 2)), backward=False)


@pytest.mark.parametrize("left_out", [("weight",), ("bias",), ("weight", "bias")])
def test_weight_and_bias_may_be_left_out(left_out: tuple[str, ...]) -> None:
    inputs = {name: tensor for name, tensor in draw((2, 8, 3, 5)).items() if name not in left_out}
    assert_close_to_judge(fast("silu"), bind(judge, "silu"), inputs)


def test_strided_images_and_other_gradients_layouts() -> None:
    inputs = draw((2, 8, 6, 10))
    cut = inputs | {"x": inputs["x"][:, :, ::2, 1:6]}
    assert_close_to_judge(fast("relu"), bind(judge, "relu"), cut)  # the gradient of the output is contiguous
    rotated = inputs | {"x": torch.randn(6, 8, 2, 5, device=DEVICE).permute(2, 1, 3, 0)}
    assert_close_to_judge(fast(), bind(judge, None), rotated)


def test_parameters_may_be_wider_than_the_image() -> None:
    inputs = draw((2, 8, 3, 5), torch.float16)
    wide = {"weight": inputs["weight"].float(), "bias": inputs["bias"].float()}
    assert_close_to_judge(fast("silu"), bind(judge, "silu"), inputs | wide)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_deterministic_and_images_independent(layout: torch.memory_format) -> None:
    inputs = draw((2, 8, 3, 5), layout=layout)
    assert_deterministic(fast("silu"), inputs)
    assert_batch_invariant(fast("silu"), inputs, ("x",))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "silu", "relu"])
@torch.no_grad()
def test_the_backends_of_a_cpu_equal_the_judge(
    act: str | None, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    inputs = {name: tensor.cpu() for name, tensor in draw((2, 24, 5, 7), dtype, layout).items()}
    before, wide = inputs["x"].clone(), {name: tensor.double() for name, tensor in inputs.items()}
    for backend in ("auto", "cpu", "reference"):
        out = bind(rms_norm_2d, act, backend=backend)(**inputs)
        assert out.dtype == dtype
        assert_rms_close(out, bind(judge, act)(**wide), what=backend)
    assert torch.equal(inputs["x"], before), "the input was overwritten"
    for left_out in ("weight", "bias"):
        some = wide | {left_out: None}
        assert_rms_close(bind(rms_norm_2d, act, backend="cpu")(**some), bind(judge, act)(**some), what=left_out)


def test_a_compiler_keeps_the_graph_whole() -> None:
    inputs = draw((2, 8, 3, 5))
    operator = bind(function.rms_norm_2d_triton, "silu")
    compiled = torch.compile(lambda **kwargs: operator(**kwargs) * 2, backend="aot_eager", fullgraph=True)
    assert_close_to_judge(compiled, lambda **kwargs: bind(judge, "silu")(**kwargs) * 2, inputs)
    with torch.no_grad():
        assert_rms_close(compiled(**inputs), bind(judge, "silu")(**inputs) * 2)


def test_what_does_not_fit_is_refused() -> None:
    x, row = torch.zeros(1, 8, 2, 2, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight must be \(8,\), one number a channel, not \(4,\)"):
        fast()(x, row[:4], row)
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) and not empty, not \(8, 2, 2\)"):
        fast()(x[0], row, row)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, not torch.float64"):
        fast()(x.double(), row, row)
    for backend in ("auto", "triton"):
        with pytest.raises(ValueError, match="act must be None, 'silu' or 'relu', not 'gelu'"):
            rms_norm_2d(x, row, row, EPS, "gelu", backend=backend)
