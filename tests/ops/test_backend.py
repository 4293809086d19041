"""Backends are chosen by rule, and Triton is never replaced silently."""

import pytest
import torch

from sana.ops import backend
from sana.ops.backend import TritonUnavailableError, choose, plain_kind, require_triton


def test_auto_is_the_cpu_path_only_for_inference_on_a_cpu():
    x = torch.zeros(1)
    assert choose("auto", x) == "reference"
    with torch.no_grad():
        assert choose("auto", x) == "cpu"
        assert choose("auto", torch.zeros(1, device="meta")) == "reference"
    with torch.inference_mode():
        assert choose("auto", x) == "cpu"
        assert choose("reference", x) == "reference"


def test_the_cpu_path_is_refused_where_gradients_may_be_asked_for():
    with pytest.raises(ValueError, match="no_grad"):
        choose("cpu", torch.zeros(1))
    with torch.no_grad(), pytest.raises(ValueError, match="CPU tensors"):
        choose("cpu", torch.zeros(1, device="meta"))


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="auto, reference, cpu, triton"):
        choose("cuda", torch.zeros(1))


def test_triton_without_a_gpu_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(TritonUnavailableError, match="on cpu.*attn_type 'linear'"):
        choose("triton", torch.zeros(1))


def test_triton_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TritonUnavailableError, match=r"sana-python\[triton\]"):
        require_triton(torch.zeros(1))


def test_the_interpreter_stands_in_for_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", torch.zeros(1)) == "triton"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("triton_linear", ("linear", "triton")),
        ("triton_mbconvpreglu", ("mbconvpreglu", "triton")),
        ("glumbconv", ("glumbconv", "auto")),
        ("flash", ("flash", "auto")),
    ],
)
def test_triton_kinds_are_plain_kinds_with_a_backend(kind, expected):
    assert plain_kind(kind) == expected
