"""The Triton Mix-FFN against the reference in wider floats: output, every gradient, and the same bits when promised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sana.ops.backend import TritonUnavailableError, interpreting
from sana.ops.mix_ffn import plan
from sana.ops.mix_ffn.function import mix_ffn_forward, mix_ffn_triton, pre_glu_conv_triton
from sana.ops.mix_ffn.reference import mix_ffn, pre_glu_conv
from tests.ops.kernels import DEVICE, assert_close_to_judge, assert_deterministic, nan_memory, run_with_gradients
from tests.tolerance import assert_rms_close

pytest.importorskip("triton")
FAST = {False: mix_ffn_triton, True: pre_glu_conv_triton}
JUDGE = {False: mix_ffn, True: pre_glu_conv}
SMALL, BLOCKS = (8, 12, 8), (24, 24, 16)  # D, M, D': one block of the interpreter's, and several with a partial one
Operator = Callable[..., Tensor]


def draw(
    batch: int,
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    pre_glu: bool = False,
    widths: tuple[int, int, int] = SMALL,
    bias: bool = True,
) -> dict[str, Tensor]:
    """Returns x and the weights by the names that `bind` gives them, scaled so that every step keeps its size."""
    dim, hidden, out = widths
    channels = hidden if pre_glu else 2 * hidden
    tensors = {
        "x": torch.randn(batch, grid[0] * grid[1], dim),
        "inverted": torch.randn(2 * hidden, dim, 1, 1) / dim**0.5,
        "depth": torch.randn(channels, 1, 3, 3) / 3,
        "point": torch.randn(out, hidden, 1, 1) / hidden**0.5,
    }
    if bias:
        sizes = {"inverted": 2 * hidden, "depth": channels, "point": out}
        tensors |= {f"{name}_bias": torch.randn(size) for name, size in sizes.items()}
    return {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}


def bind(function: Operator, grid: tuple[int, int], **options: bool) -> Operator:
    """Returns an operator of named tensors."""

    def operator(x, inverted, depth, point, inverted_bias=None, depth_bias=None, point_bias=None) -> Tensor:
        pairs = (inverted, inverted_bias), (depth, depth_bias), (point, point_bias)
        return function(x, grid, *pairs, **options)

    return operator


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collects what autograd keeps for the backward pass."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize(
    ("pre_glu", "batch", "grid", "dtype", "bias"),
    [
        (False, 2, (1, 1), torch.float32, False),
        (False, 2, (3, 2), torch.float16, True),
        (False, 1, (4, 7), torch.float32, True),
        (True, 1, (1, 6), torch.float32, True),
        (True, 2, (3, 2), torch.float16, False),
        (True, 1, (4, 7), torch.float32, True),
    ],
)
def test_output_and_gradients(pre_glu: bool, batch: int, grid: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    inputs = draw(batch, grid, dtype, pre_glu=pre_glu, widths=BLOCKS, bias=bias)
    assert_close_to_judge(bind(FAST[pre_glu], grid), bind(JUDGE[pre_glu], grid), inputs, wide=torch.float64)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("chosen", [plan.INTERPRETED, None], ids=["epilogue", "library"])
def test_both_ways_to_the_expansion(chosen: plan.Gemm | None, glu: bool, keep: bool) -> None:
    from sana.ops.mix_ffn.forward import expand

    x, weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((37, 21), (22, 21), (22,)))
    with nan_memory():
        active, pre = expand(x, weight, bias if keep else None, glu=glu, keep=keep, plan=chosen)
    wide = x.double() @ weight.double().t() + (bias.double() if keep else 0)
    value, gate = wide.chunk(2, dim=1) if glu else (torch.ones_like(wide), wide)
    assert_rms_close(active, value * gate * gate.sigmoid(), torch.float32)
    assert (pre is not None) == keep
    if pre is not None:
        assert_rms_close(pre, wide, torch.float32)


@pytest.mark.parametrize("pre_glu", [False, True])
def test_recomputing_gives_the_same_bits(pre_glu: bool) -> None:
    inputs = draw(1, (2, 5), torch.float16, pre_glu=pre_glu)
    cotangent = torch.randn(1, 10, 8, device=DEVICE)
    kept, again = (
        run_with_gradients(bind(FAST[pre_glu], (2, 5), recompute=recompute), inputs, cotangent)
        for recompute in (False, True)
    )
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), f"{name} differs"


def test_recomputing_keeps_x_and_not_the_expansion() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in draw(1, (2, 2)).items()}
    sizes = []
    for recompute in (False, True):
        with saved_tensors() as kept:
            bind(mix_ffn_triton, (2, 2), recompute=recompute)(**inputs)
        owned = {tensor.data_ptr() for tensor in inputs.values()}
        sizes.append(sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in owned))
    assert sizes == [4 * 24, 0]


def test_two_runs_give_the_same_bits() -> None:
    assert_deterministic(bind(mix_ffn_triton, (2, 3)), draw(2, (2, 3)))


@pytest.mark.parametrize("pre_glu", [False, True])
def test_kernels_give_an_image_the_same_bits_in_every_batch(pre_glu: bool) -> None:
    from sana.ops.mix_ffn.backward import gate_backward, input_backward
    from sana.ops.mix_ffn.forward import depthwise, expand

    size, tokens = (4, 4), 16  # a whole row block: the interpreter's product depends on a row's place in its block
    tensors = draw(2, size, pre_glu=pre_glu)
    x, weight = tensors["x"].flatten(0, 1), tensors["inverted"].flatten(1)
    taps, bias = tensors["depth"].reshape(-1, 9).t().contiguous(), tensors["depth_bias"]
    d_out = torch.randn(2 * tokens, 12, device=DEVICE)

    def run(rows: slice) -> dict[str, Tensor]:
        active, pre = expand(x[rows], weight, tensors["inverted_bias"], glu=pre_glu, keep=True, plan=plan.INTERPRETED)
        options = {"gated": not pre_glu, "tile": plan.forward_tile(4, None)}
        gated, d_conv, _ = gate_backward(active, size, taps, bias, d_out[rows], **options)
        d_pre, _ = input_backward(d_conv, size, taps, pre, pre_glu=pre_glu, tile=plan.input_gradient_tile(4, None))
        out = depthwise(active, size, taps, bias, **options)
        return {"expansion": pre, "active": active, "out": out, "out again": gated, "d_conv": d_conv, "d_pre": d_pre}

    whole, alone = run(slice(None)), run(slice(tokens, None))
    for name, tensor in whole.items():
        assert torch.equal(tensor[tokens:], alone[name]), f"{name} depends on the rest of the batch"


@pytest.mark.parametrize("wanted", [("x",), ("depth", "point_bias"), ("point_bias",), ("inverted_bias", "depth_bias")])
def test_frozen_tensors_change_no_gradient(wanted: tuple[str, ...]) -> None:
    inputs, operator = draw(1, (2, 2)), bind(mix_ffn_triton, (2, 2))
    cotangent = torch.randn(1, 4, 8, device=DEVICE)
    everything = run_with_gradients(operator, inputs, cotangent)
    leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in inputs.items()}
    operator(**leaves).backward(cotangent)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, everything[f"d {name}"]), name


@pytest.mark.parametrize("layout", ["slice of a wider tensor", "channels first"])
def test_strided_input(layout: str) -> None:
    inputs, operator = draw(2, (1, 3)), bind(mix_ffn_triton, (1, 3))
    expected = operator(**inputs)
    x = inputs["x"]
    if layout == "channels first":
        inputs["x"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        inputs["x"] = torch.cat((torch.full_like(x, torch.nan), x), dim=-1)[..., 8:]
    assert not inputs["x"].is_contiguous()
    assert torch.equal(operator(**inputs), expected)


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert bind(mix_ffn_triton, (2, 2))(**draw(0, (2, 2))).shape == (0, 4, 8)


def test_autocast_casts_as_it_does_for_convolutions() -> None:
    inputs = draw(1, (2, 3))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast(DEVICE, torch.float16):
        out = bind(mix_ffn_triton, (2, 3))(**leaves)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves.values() if leaf.grad is not None} == {torch.float32}
    narrow = {name: tensor.half().double() for name, tensor in inputs.items()}
    assert_rms_close(out, bind(mix_ffn, (2, 3))(**narrow))


@pytest.mark.parametrize("keep", [False, True])
def test_registration_with_pytorch(keep: bool) -> None:
    tensors = draw(1, (1, 2))
    order = ("x", "inverted", "inverted_bias", "depth", "depth_bias", "point", "point_bias")
    arguments = (*(tensors[name].requires_grad_() for name in order), 1, 2, False, keep)
    torch.library.opcheck(mix_ffn_forward, arguments)


def test_torch_compile_breaks_no_graph() -> None:
    operator, inputs = bind(mix_ffn_triton, (1, 2)), draw(1, (1, 2))
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    cotangent = torch.randn(1, 2, 8, device=DEVICE)
    expected, actual = (run_with_gradients(run, inputs, cotangent) for run in (operator, compiled))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 24)}, r"5 tokens on a grid of 2 x 3"),
        ({"x": torch.zeros(6, 24)}, r"x \(B, N, D\)"),
        ({"depth": torch.zeros(24, 1, 3, 3)}, r"depth weight has shape \(24, 1, 3, 3\), expected \(48, 1, 3, 3\)"),
        ({"depth": torch.zeros(48, 1, 5, 5)}, r"depth weight has shape \(48, 1, 5, 5\)"),
        ({"point_bias": torch.zeros(24)}, r"point bias has shape \(24,\), expected \(16,\)"),
        ({"inverted": torch.zeros(48, 24, 1, 1).double()}, r"inverted weight is torch.float64 and x is torch.float32"),
        ({"point": None}, r"takes x"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    inputs = draw(1, (2, 3), widths=BLOCKS) | {
        name: tensor if tensor is None else tensor.to(DEVICE) for name, tensor in change.items()
    }
    with pytest.raises(ValueError, match=message):
        bind(mix_ffn_triton, (2, 3))(**inputs)


def test_without_a_device_for_triton_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = {name: tensor.cpu() for name, tensor in draw(1, (1, 2)).items()}
    with pytest.raises(TritonUnavailableError, match="CUDA"):
        bind(mix_ffn_triton, (1, 2))(**inputs)


def test_the_plan_takes_the_library_where_a_kernel_cannot_win() -> None:
    official = (1024, 5760, 1152)
    assert plan.expansion_plan(*official, torch.bfloat16, (8, 0)) is not None
    assert plan.expansion_plan(*official, torch.bfloat16, (9, 0)) is not None
    assert plan.expansion_plan(1024, 11200, 2240, torch.bfloat16, (9, 0)) is None  # more arithmetic a saved byte
    assert plan.expansion_plan(*official, torch.float32, (9, 0)) is None  # exact float32 has no tensor cores
    assert plan.expansion_plan(1024, 5760, 1150, torch.bfloat16, (9, 0)) is None  # rows not aligned for wide loads
    assert plan.expansion_plan(*official, torch.bfloat16, None) is None  # the interpreter's bfloat16 product is wrong
    assert plan.expansion_plan(*official, torch.float16, None) == plan.INTERPRETED


@pytest.mark.gpu
@pytest.mark.skipif(interpreting(), reason="needs kernels compiled for the GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pre_glu", [False, True])
@pytest.mark.parametrize(
    ("batch", "grid", "widths"),
    [
        (2, (32, 32), (1152, 2880, 1152)),
        (1, (32, 32), (2240, 5600, 2240)),
        (2, (23, 41), (1152, 2880, 1152)),
        (3, (1, 1), (224, 560, 224)),
        (1, (5, 3), (20, 12, 9)),
    ],
)
def test_on_a_gpu(
    batch: int, grid: tuple[int, int], widths: tuple[int, int, int], pre_glu: bool, dtype: torch.dtype
) -> None:
    inputs = draw(batch, grid, dtype, pre_glu=pre_glu, widths=widths)
    assert_close_to_judge(bind(FAST[pre_glu], grid), bind(JUDGE[pre_glu], grid), inputs, wide=torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(interpreting(), reason="needs kernels compiled for the GPU")
@pytest.mark.parametrize("pre_glu", [False, True])
def test_same_bits_on_a_gpu(pre_glu: bool) -> None:
    grid, fast = (32, 32), FAST[pre_glu]
    inputs = draw(2, grid, torch.bfloat16, pre_glu=pre_glu, widths=(1152, 2880, 1152))
    assert_deterministic(bind(fast, grid), inputs)
    cotangent = torch.randn(2, 1024, 1152, device=DEVICE)
    kept, again = (
        run_with_gradients(bind(fast, grid, recompute=recompute), inputs, cotangent) for recompute in (False, True)
    )
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []
