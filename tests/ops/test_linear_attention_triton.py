"""The Triton linear attention against the float32 reference: output, every gradient, odd sizes, exact repetition."""

import functools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sana.ops.backend import TritonUnavailableError
from sana.ops.linear_attention.function import linear_attention_triton
from sana.ops.linear_attention.reference import linear_attention_reference
from tests.ops.kernels import (
    DEVICE,
    assert_batch_invariant,
    assert_close_to_judge,
    assert_deterministic,
    nan_memory,
    run_with_gradients,
)

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [(2, 7, 3, 16), (1, 33, 2, 24), (3, 1, 1, 32), (2, 300, 1, 32), (1, 65, 1, 64), (1, 40, 2, 128), (1, 9, 2, 5)]


def draw(
    images: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, norm: bool = False
) -> dict[str, Tensor]:
    width = heads * head_dim
    inputs = {"qkv": torch.randn(images, tokens, 3 * width, device=DEVICE).to(dtype)}
    if norm:
        inputs |= {f"{name}_weight": 1 + torch.randn(width, device=DEVICE) / 4 for name in "qk"}
    return inputs


def fast(heads: int, **options: float):
    return functools.partial(linear_attention_triton, num_heads=heads, **options)


def judge(heads: int, **options: float):
    return functools.partial(linear_attention_reference, num_heads=heads, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_close_to_judge(fast(shape[2]), judge(shape[2]), draw(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 3, 16), (1, 33, 2, 24), (1, 260, 1, 16)])
def test_norms_over_all_heads(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    options = {"norm_eps": 1e-2}
    assert_close_to_judge(fast(shape[2], **options), judge(shape[2], **options), draw(*shape, dtype, norm=True))


def test_norm_weights_in_16_bits() -> None:
    inputs = {name: tensor.half() for name, tensor in draw(1, 12, 2, 16, torch.float16, norm=True).items()}
    assert_close_to_judge(fast(2), judge(2), inputs)


def test_a_great_eps_counts_in_every_gradient() -> None:
    inputs = draw(1, 6, 2, 16, torch.float32, norm=True)
    assert_close_to_judge(fast(2, eps=5.0), judge(2, eps=5.0), inputs)


def test_memory_beside_the_rows_is_not_read() -> None:
    wide = torch.full((9, 2, 200), float("nan"), device=DEVICE)
    view = wide[1:8, :, 7 : 7 + 144].transpose(0, 1)  # (2, 7, 144), rows far apart, batch inside
    view.copy_(torch.randn(2, 7, 144))
    assert_close_to_judge(fast(2), judge(2), {"qkv": view})
    dense = run_with_gradients(fast(2), {"qkv": view.contiguous()}, torch.ones(2, 7, 48, device=DEVICE))
    strided = run_with_gradients(fast(2), {"qkv": view}, torch.ones(1, 1, 1, device=DEVICE).expand(2, 7, 48))
    for name, tensor in dense.items():
        assert torch.equal(tensor, strided[name]), name


def test_channels_apart_are_copied() -> None:
    columns = torch.randn(1, 48, 5, device=DEVICE).transpose(1, 2)
    assert_close_to_judge(fast(1), judge(1), {"qkv": columns})


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_a_positive_entry(dtype: torch.dtype, norm: bool) -> None:
    inputs = draw(1, 6, 2, 16, dtype, norm)
    if norm:
        inputs["q_weight"] = inputs["q_weight"].abs()
    inputs["qkv"][:, 2:4, :16] = -inputs["qkv"][:, 2:4, :16].abs()  # head 0 of tokens 2 and 3
    with nan_memory():
        results = run_with_gradients(fast(2), inputs, torch.full((1, 6, 32), 100.0, device=DEVICE))
    assert all(torch.isfinite(tensor).all() for tensor in results.values())
    assert torch.equal(results["out"][:, 2:4, :16], torch.zeros(1, 2, 16, dtype=dtype, device=DEVICE))
    if not norm:
        assert not results["d qkv"][:, 2:4, :16].any()
        assert results["d qkv"][:, :2, :16].any()


def test_keys_without_a_positive_entry() -> None:
    qkv = torch.randn(1, 5, 48, device=DEVICE)
    qkv[..., 16:32] = -qkv[..., 16:32].abs()
    results = run_with_gradients(fast(1), {"qkv": qkv}, torch.ones(1, 5, 16, device=DEVICE))
    assert not any(tensor.any() for tensor in results.values())


@pytest.mark.parametrize("norm", [False, True])
def test_sums_beyond_the_range_of_float16(norm: bool) -> None:
    inputs = draw(1, 270, 1, 16, torch.float16, norm)
    inputs["qkv"] = (inputs["qkv"] * 8 + 40).half()  # sum relu(k) v is about 430,000
    backward = not norm
    assert_close_to_judge(fast(1), judge(1), inputs, backward=backward)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    assert_deterministic(fast(2), draw(1, 270, 1, 32, dtype, norm=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    assert_batch_invariant(fast(2), draw(2, 270, 1, 16, dtype), ("qkv",))
    assert_batch_invariant(fast(2), draw(2, 5, 2, 16, dtype, norm=True), ("qkv",))


def test_no_gradient_along_what_does_not_change_the_output() -> None:
    """Scaling the queries of one head changes nothing, so the gradient is at right angles to them."""
    qkv = torch.randn(1, 20, 96, device=DEVICE)
    cotangent = torch.randn(1, 20, 32, device=DEVICE)
    gradient = run_with_gradients(fast(2), {"qkv": qkv}, cotangent)["d qkv"][..., :32].unflatten(-1, (2, 16))
    query = qkv[..., :32].unflatten(-1, (2, 16))
    along = (gradient * query).sum(-1).abs()
    assert (along <= 1e-5 * gradient.norm(dim=-1) * query.norm(dim=-1)).all()


def test_torch_compile_keeps_it_whole() -> None:
    torch._dynamo.reset()
    weight = torch.randn(96, 8, device=DEVICE)

    def layer(x: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return linear_attention_triton(x @ weight.t(), 2, q_weight=q_weight, k_weight=k_weight) * 2

    inputs = draw(1, 1, 2, 16, torch.float32, norm=True) | {"x": torch.randn(2, 11, 8, device=DEVICE)}
    inputs.pop("qkv")
    cotangent = torch.randn(2, 11, 32, device=DEVICE)
    eager = run_with_gradients(layer, inputs, cotangent)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for name, tensor in run_with_gradients(compiled, inputs, cotangent).items():
        torch.testing.assert_close(tensor, eager[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("norm", [False, True])
def test_the_operator_is_registered_as_it_behaves(norm: bool) -> None:
    inputs = draw(1, 5, 2, 16, torch.float32, norm)
    leaves = [inputs[name].requires_grad_() if name in inputs else None for name in ("qkv", "q_weight", "k_weight")]
    torch.library.opcheck(torch.ops.sana.linear_attention.default, (leaves[0], 2, 1e-8, leaves[1], leaves[2], 1e-5))


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "complaint"),
    [
        ((1, 4, 48), torch.float64, {}, "float32, float16 or bfloat16, not torch.float64"),
        ((4, 48), torch.float32, {}, r"3 \* 2 \* d\) for 2 heads, not \(4, 48\)"),
        ((1, 4, 50), torch.float32, {}, r"not \(1, 4, 50\)"),
        ((1, 0, 48), torch.float32, {}, "must not be empty"),
        ((1, 4, 6 * 129), torch.float32, {}, "head dims up to 128, not 129"),
        ((1, 4, 48), torch.float32, {"eps": 0.0}, "eps must be positive"),
        ((1, 4, 48), torch.float32, {"q_weight": torch.ones(16)}, "together"),
        (
            (1, 4, 48),
            torch.float32,
            {"q_weight": torch.ones(16), "k_weight": torch.ones(8)},
            r"k_weight must be \(16,\)",
        ),
        (
            (1, 4, 48),
            torch.float32,
            {"q_weight": torch.ones(16, device="meta"), "k_weight": torch.ones(16)},
            "q_weight is on meta and qkv on cpu",
        ),
    ],
)
def test_wrong_inputs_are_named(shape: tuple[int, ...], dtype: torch.dtype, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        linear_attention_triton(torch.randn(shape, dtype=dtype), 2, **options)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(TritonUnavailableError, match="cpu"):
        linear_attention_triton(torch.randn(1, 4, 48), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16384, 70, 32), (4, 1024, 36, 32), (2, 4097, 20, 112)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_close_to_judge(fast(shape[2]), judge(shape[2]), draw(*shape, dtype))


@pytest.mark.gpu
def test_real_shapes_with_norms() -> None:
    assert_close_to_judge(fast(70), judge(70), draw(2, 1024, 70, 32, torch.bfloat16, norm=True))


@pytest.mark.gpu
def test_real_shapes_repeat_exactly() -> None:
    inputs = draw(3, 1500, 36, 32, torch.bfloat16, norm=True)
    assert_deterministic(fast(36), inputs)
    assert_batch_invariant(fast(36), inputs, ("qkv",))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    qkv = torch.randn(20, 16384, 6720, device="cuda", dtype=torch.bfloat16)  # 2.2e9 numbers
    assert torch.equal(linear_attention_triton(qkv, 70)[-1:], linear_attention_triton(qkv[-1:], 70))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_gives_the_same(mode: str) -> None:
    torch._dynamo.reset()
    inputs = draw(2, 256, 8, 32, torch.bfloat16, norm=True)
    cotangent = torch.randn(2, 256, 256, device="cuda", dtype=torch.bfloat16)
    eager = run_with_gradients(fast(8), inputs, cotangent)
    compiled = torch.compile(fast(8), mode=mode, fullgraph=True)
    for _ in range(3):  # "reduce-overhead" records a CUDA graph on its second call
        results = {name: tensor.clone() for name, tensor in run_with_gradients(compiled, inputs, cotangent).items()}
    for name, tensor in eager.items():
        torch.testing.assert_close(results[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
def test_a_captured_graph_replays_it() -> None:
    qkv = draw(2, 256, 8, 32, torch.bfloat16)["qkv"]
    expected = linear_attention_triton(qkv, 8)  # compiles the kernels, which a capture must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_attention_triton(qkv, 8)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    qkv.copy_(qkv.flip(1))
    graph.replay()
    torch.testing.assert_close(out, expected.flip(1), rtol=2e-2, atol=2e-2)
