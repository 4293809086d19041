"""What every kernel test shares: what to compile, memory full of NaN, comparisons with the judge. No test is here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.tolerance import RMS_RATIO_BACKWARD, RMS_RATIO_FORWARD, rms_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Spec:
    """One variant of a kernel that the compile gate turns into PTX and a cubin for every architecture.

    Args:
        name: shown when it fails, such as "linear_attention.forward bf16 d32".
        kernel: the function decorated with `triton.jit`.
        signature: type of every argument that is not a constexpr, such as {"x": "*bf16:16", "N": "i32"}; the ending
            ":16" promises divisibility by 16, as a launch does for aligned pointers and such integers.
        constexprs: value of every constexpr.
        num_warps: as launched.
        num_stages: as launched.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fills fresh memory with NaN, integers with their greatest value: what a kernel leaves unwritten shows."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run_with_gradients(
    operator: Operator, inputs: Mapping[str, Tensor], cotangent: Tensor | None = None
) -> dict[str, Tensor]:
    """Runs `operator(**inputs)` and its backward pass on leaves that share the inputs' memory and strides.

    Args:
        operator: tensors by name in, one tensor out.
        inputs: those of a floating dtype get gradients.
        cotangent: gradient of the output; without one, no gradients are computed.

    Returns:
        {"out": ..., "d <input>": ...}.
    """
    leaves = {
        name: tensor.detach().requires_grad_(cotangent is not None and tensor.is_floating_point())
        for name, tensor in inputs.items()
    }
    out = operator(**leaves)
    results = {"out": out.detach()}
    if cotangent is not None:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(out, list(wanted.values()), cotangent.to(out.dtype))
        results |= {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results


def assert_close_to_judge(
    fast: Operator,
    judge: Operator,
    inputs: Mapping[str, Tensor],
    *,
    backward: bool = True,
    wide: torch.dtype = torch.float32,
) -> None:
    """Asserts that output and every gradient of a kernel equal the judge's, within the table of tests/tolerance.py.

    The kernel runs on memory full of NaN and must return the inputs' dtypes. The judge gets the same values in `wide`.
    The tolerance is that of the kernel's output dtype. The message names all tensors that are off.

    Args:
        fast: the kernel's operator, tensors by name in, one tensor out.
        judge: the reference with the same arguments.
        inputs: tensors by name, in the dtype and strides under test.
        backward: compare gradients too, for a random gradient of the output.
        wide: dtype of the judge.
    """
    plain = {
        name: tensor.detach().to(wide) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    with torch.no_grad():
        out = judge(**plain)
    narrow = next(tensor.dtype for tensor in inputs.values() if tensor.is_floating_point())
    cotangent = torch.randn(out.shape, device=out.device).to(narrow) if backward else None
    expected = run_with_gradients(judge, plain, cotangent)
    with nan_memory():
        actual = run_with_gradients(fast, inputs, cotangent)
    complaints = [text for name in expected if (text := _complaint(name, actual, expected, inputs))]
    assert not complaints, "; ".join(complaints)


def _complaint(
    name: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> str:
    mine, theirs, dtype = actual[name], expected[name], actual["out"].dtype
    if mine.shape != theirs.shape:
        return f"{name}: shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
    if name != "out" and mine.dtype != inputs[name.removeprefix("d ")].dtype:
        return f"{name}: dtype {mine.dtype}, but its input has another"
    if not torch.isfinite(mine).all():
        return f"{name}: {int((~torch.isfinite(mine)).sum())} of {mine.numel()} values are not finite"
    limit = (RMS_RATIO_FORWARD if name == "out" else RMS_RATIO_BACKWARD)[dtype]
    ratio = rms_ratio(mine, theirs)
    return f"{name}: RMS ratio {ratio:.3e} exceeds {limit:.0e}" if ratio > limit else ""


def assert_deterministic(operator: Operator, inputs: Mapping[str, Tensor]) -> None:
    """Asserts that two runs give the same bits, in the output and in every gradient."""
    cotangent = torch.randn_like(operator(**inputs))
    first, second = (run_with_gradients(operator, inputs, cotangent) for _ in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"two runs differ in {different}"


def assert_batch_invariant(operator: Operator, inputs: Mapping[str, Tensor], batched: tuple[str, ...]) -> None:
    """Asserts that row i of the output and of the gradients of `batched` has the same bits whatever the batch is.

    Args:
        operator: tensors by name in, one tensor out with the batch first.
        inputs: a batch of two rows or more.
        batched: names of the inputs whose first axis is the batch.
    """
    cotangent = torch.randn_like(operator(**inputs))
    whole = run_with_gradients(operator, inputs, cotangent)
    for row in range(cotangent.shape[0]):
        cut = {name: tensor[row : row + 1] if name in batched else tensor for name, tensor in inputs.items()}
        alone = run_with_gradients(operator, cut, cotangent[row : row + 1])
        for name in ("out", *(f"d {key}" for key in batched)):
            assert torch.equal(alone[name][0], whole[name][row]), f"{name}[{row}] depends on the rest of the batch"
