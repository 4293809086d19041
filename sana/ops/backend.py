"""The one place that chooses how an operator is computed. No kernel is here, and nothing imports Triton unasked.

Backends: "reference" (plain PyTorch, differentiable, on any device), "cpu" (the same numbers, arranged for inference on
a CPU) and "triton" (fused kernels, differentiable). "auto" is never Triton: kernels are asked for by name.
"""

import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "reference", "cpu", "triton")
# Kinds of layers that are another kind computed by Triton kernels: official value -> the plain kind.
TRITON_KINDS = {"triton_linear": "linear", "triton_mbconvpreglu": "mbconvpreglu"}


class TritonUnavailableError(RuntimeError):
    """Triton kernels were asked for where they cannot run; says why and what to do. There is no silent fallback."""


def choose(requested: str, x: Tensor) -> str:
    """Returns the backend that computes an operator on `x`: "reference", "cpu" or "triton".

    Args:
        requested: one of BACKENDS.
        x: the operator's input.

    Raises:
        ValueError: an unknown name, or "cpu" for a tensor that is elsewhere or part of an autograd graph.
        TritonUnavailableError: "triton" where it cannot run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {requested!r}.")
    if requested == "auto":
        return "cpu" if _is_cpu_inference(x) else "reference"
    if requested == "cpu" and not _is_cpu_inference(x):
        raise ValueError(
            "backend 'cpu' is for CPU tensors under torch.no_grad without autocast; use 'auto' or 'reference'."
        )
    if requested == "triton" and not torch.compiler.is_compiling():  # the operator itself checks when it runs
        require_triton(x)
    return requested


def _is_cpu_inference(x: Tensor) -> bool:
    """Whether nothing but the numbers is asked for: no gradient of either kind, no autocast, no tracing."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
    )


def require_triton(x: Tensor) -> None:
    """Checks that Triton kernels can run on a tensor.

    Raises:
        TritonUnavailableError: Triton is not installed, or the tensor is not on a CUDA device.
    """
    if importlib.util.find_spec("triton") is None:
        raise TritonUnavailableError(
            "Triton kernels were asked for, and triton is not installed: pip install 'sana-python[triton]', "
            "or use attn_type 'linear', ffn_type 'glumbconv' or 'mbconvpreglu', backend 'auto'."
        )
    if x.device.type != "cuda" and not interpreting():
        raise TritonUnavailableError(
            f"Triton kernels were asked for on {x.device}, and they run on CUDA devices only: move the model there, or "
            "use attn_type 'linear', ffn_type 'glumbconv' or 'mbconvpreglu', backend 'auto'."
        )


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def plain_kind(kind: str) -> tuple[str, str]:
    """Returns a layer kind without Triton and the backend it asks for: "triton_linear" -> ("linear", "triton")."""
    return (TRITON_KINDS[kind], "triton") if kind in TRITON_KINDS else (kind, "auto")
