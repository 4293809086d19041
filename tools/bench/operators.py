"""Operators of sana.ops against plain PyTorch, torch.compile and a chunked form, beside the limits of the device."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana import ops
from sana.ops.linear_attention.reference import linear_attention_reference
from tools.bench import baselines
from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import DTYPES, exact_convolutions, usable_triton
from tools.bench.results import OURS
from tools.bench.setting import Setting

TRITON = f"{OURS} (Triton)"
RMS_EPS = 1e-5
LIMIT = 60.0


@dataclass(frozen=True)
class Shape:
    """Tokens as in an official network: `dim` channels, heads of 32, `batch` images of `side` x `side` tokens."""

    label: str
    dim: int
    side: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.side**2


@dataclass(frozen=True)
class Operator:
    """One operator on one shape.

    Attributes:
        ours: called with the inputs and `backend`.
        plain: called with the inputs.
        others: more forms of the same, by name.
        exact: the float32 judge, called with float32 inputs.
        inputs: tensors; the first is differentiated.
        work: of the forward.
    """

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    work: Work
    others: Mapping[str, Callable[..., Tensor]]


def shapes(setting: Setting) -> list[Shape]:
    """Official shapes; the first is the one that is compiled as well."""
    if setting.suite == "quick":
        return [Shape("reduced: 64 tokens of width 64", 64, 8, 1)]
    if setting.device == "cpu":
        return [Shape("0.6B, 1024 px, batch 1", 1152, 32, 1)]
    return [
        Shape("0.6B, 1024 px, batch 32", 1152, 32, 32),
        Shape("1.6B, 4096 px, batch 2", 2240, 128, 2),
        Shape("0.6B, 1024 px, batch 2", 1152, 32, 2),
    ]


def cases(setting: Setting) -> list[Case]:
    """All operators on all shapes, forward, and on a GPU backward; what a target asks for comes first."""
    dtypes = ("fp32", "bf16") if setting.device == "cpu" else ("bf16",)
    directions = ("forward",) if setting.device == "cpu" else ("forward", "backward")
    found = []
    for name, make in OPERATORS.items():
        for number, shape in enumerate(shapes(setting)):
            for dtype in dtypes:
                compiled = number == 0 and dtype == dtypes[0] and setting.suite != "quick"
                for direction in directions:
                    build = partial(_build, make, shape, dtype, direction, setting, compiled)
                    large = number < 2 and setting.device != "cpu"  # a small one lies in the cache
                    key = f"{name}.{direction}" if large else ""
                    title = f"{name.replace('_', ' ')} {direction}, {dtype}, {shape.label}"
                    found.append(Case("operators", title, build, seconds=3.0, limit=LIMIT, key=key))
    return found


def _build(
    make: Callable[..., Operator], shape: Shape, dtype: str, direction: str, setting: Setting, compiled: bool
) -> Comparison:
    generator = torch.Generator(setting.device).manual_seed(0)
    operator = make(shape, DTYPES[dtype], partial(torch.randn, generator=generator, device=setting.device))
    functions: dict[str, Callable[..., Tensor]] = {}
    if usable_triton(setting.device):
        functions[TRITON] = partial(operator.ours, backend="triton")
    functions[OURS] = partial(operator.ours, backend="auto")
    functions |= {"eager": operator.plain, **operator.others}
    if compiled and _compiler(setting.device):
        functions["torch.compile"] = torch.compile(operator.plain)
    backward = direction == "backward"
    runs = {name: _run(function, operator.inputs, backward) for name, function in functions.items()}

    def check() -> dict[str, Check]:
        wide = tuple(tensor.float() for tensor in operator.inputs)
        with exact_convolutions():
            exact = None if dtype == "fp32" else _run(operator.exact, wide, backward)()
        first, *others = runs
        actual = runs[first]().clone()
        return {name: compare(actual, runs[name](), exact) for name in others}

    work = operator.work
    if backward:  # reads the input and a gradient like the output, writes a gradient like the input
        inputs = operator.inputs[0].nbytes
        work = Work(work.bytes + inputs, 2 * work.flops)
    facts = {"shape": list(operator.inputs[0].shape), "dtype": dtype}
    sides = [Side(name, run) for name, run in runs.items()]
    return Comparison(sides, check, setting.device, kernels=True, work=work, facts=facts)


def _run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], Tensor]:
    if not backward:

        @torch.no_grad()
        def forward() -> Tensor:
            return function(*inputs)

        return forward
    first = inputs[0].clone().requires_grad_()
    out = function(first, *inputs[1:])
    gradient = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(2), device=out.device)
    gradient = gradient.to(out.dtype)
    return lambda: torch.autograd.grad(out, first, gradient, retain_graph=True)[0]


def _compiler(device: str) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler, or Triton."""
    return usable_triton(device) if device != "cpu" else shutil.which("g++") is not None


def _linear_attention(shape: Shape, dtype: torch.dtype, randn: Callable[..., Tensor]) -> Operator:
    heads = shape.dim // 32
    qkv = randn(shape.batch, shape.tokens, 3 * shape.dim).to(dtype)
    return Operator(
        lambda x, backend: ops.linear_attention(x, heads, backend=backend),
        partial(baselines.linear_attention, num_heads=heads),
        lambda x: linear_attention_reference(x, heads),
        (qkv,),
        Work(qkv.nbytes * 4 / 3, 2 * 2.0 * shape.batch * shape.tokens * shape.dim * 32),
        {"chunked, fla-style": partial(baselines.chunked_linear_attention, num_heads=heads)},
    )


def _mix_ffn(shape: Shape, dtype: torch.dtype, randn: Callable[..., Tensor]) -> Operator:
    dim, hidden, grid = shape.dim, int(2.5 * shape.dim), (shape.side, shape.side)
    x = randn(shape.batch, shape.tokens, dim).to(dtype)
    weights = [
        (randn(2 * hidden, dim, 1, 1) / dim**0.5).to(dtype), (randn(2 * hidden) * 0.02).to(dtype),
        (randn(2 * hidden, 1, 3, 3) / 3).to(dtype), (randn(2 * hidden) * 0.02).to(dtype),
        (randn(dim, hidden, 1, 1) / hidden**0.5).to(dtype),
    ]  # fmt: skip

    def convolutions(wide: bool) -> tuple[Any, Any, Any]:
        up, up_bias, depth, depth_bias, down = (weight.float() for weight in weights) if wide else weights
        return (up, up_bias), (depth, depth_bias), (down, None)

    flops = 2.0 * shape.batch * shape.tokens * (3 * dim * hidden + 18 * hidden)
    return Operator(
        lambda x, backend: ops.mix_ffn(x, grid, *convolutions(False), backend=backend),
        lambda x: baselines.mix_ffn(x, grid, *convolutions(False)),
        lambda x: baselines.mix_ffn(x, grid, *convolutions(True)),
        (x,),
        Work(2 * x.nbytes + sum(weight.nbytes for weight in weights), flops),
        {},
    )


def _rms_norm_2d(shape: Shape, dtype: torch.dtype, randn: Callable[..., Tensor]) -> Operator:
    """On the image of a stage of DC-AE's decoder, 256 channels and as many elements as the tokens have."""
    side = int((shape.tokens * shape.dim / 256) ** 0.5)
    image = randn(shape.batch, 256, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (1 + 0.1 * randn(256)).to(dtype), (0.1 * randn(256)).to(dtype)
    return Operator(
        lambda x, backend: ops.rms_norm_2d(x, weight, bias, RMS_EPS, backend=backend),
        lambda x: baselines.rms_norm_2d(x, weight, bias, RMS_EPS),
        lambda x: baselines.rms_norm_2d(x, weight.float(), bias.float(), RMS_EPS),
        (image,),
        Work(2.0 * image.nbytes),
        {},
    )


def _modulated_layer_norm(shape: Shape, dtype: torch.dtype, randn: Callable[..., Tensor]) -> Operator:
    x = randn(shape.batch, shape.tokens, shape.dim).to(dtype)
    shift, scale = ((0.3 * randn(shape.batch, 1, shape.dim)).to(dtype) for _ in range(2))
    return Operator(
        lambda x, backend: ops.modulated_layer_norm(x, shift, scale, backend=backend),
        lambda x: baselines.modulated_layer_norm(x, shift, scale),
        lambda x: baselines.modulated_layer_norm(x, shift.float(), scale.float()),
        (x,),
        Work(2.0 * x.nbytes),
        {},
    )


OPERATORS: dict[str, Callable[..., Operator]] = {
    "linear_attention": _linear_attention,
    "mix_ffn": _mix_ffn,
    "rms_norm_2d": _rms_norm_2d,
    "modulated_layer_norm": _modulated_layer_norm,
}
