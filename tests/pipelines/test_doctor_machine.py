"""Devices and kernels as the diagnosis tells them, against PyTorch's own word and stand-ins for other machines."""

import os
import shutil

import pytest
import torch

from sana.ops import backend, packing
from sana.pipelines import doctor_machine
from sana.pipelines.doctor import ABSENT, OK


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_devices_of_this_machine():
    found = by_name(doctor_machine.check_devices())
    assert found["cpu"].data["cores"] == os.cpu_count() and found["cpu"].data["threads"] == torch.get_num_threads()
    assert found["cpu"].data["capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["default"].data["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert ("cuda:0" in found) == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("built", "tool", "reason"),
    [
        (None, None, "built without CUDA"),
        ("13.0", None, "no NVIDIA driver"),
        ("13.0", "/x", "the driver shows no device"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, built, tool, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(shutil, "which", lambda name: tool)
    (finding,) = doctor_machine.cuda()
    assert finding.state == ABSENT and reason in finding.text


@pytest.mark.parametrize(("major", "bf16"), [(9, True), (7, False)])
def test_gpus_have_a_line_each(monkeypatch, major, bf16):
    class Properties:
        name, total_memory, minor = "A GPU", 80 * 2**30, 0

    Properties.major = major
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    first, second = doctor_machine.cuda()
    assert (first.name, second.name) == ("cuda:0", "cuda:1") and "A GPU, 80.0 GiB" in first.text
    assert first.data["bf16"] is bf16 and first.state == OK


def test_kernels_are_those_that_the_operators_use(monkeypatch):
    found = by_name(doctor_machine.check_kernels())
    with torch.no_grad():
        assert found["operators"].data["cpu_inference"] == backend.choose("auto", torch.zeros(1)) == "cpu"
    assert found["operators"].data["otherwise"] == "reference"
    assert found["packed weights"].data["budget"] == packing.pack_budget()
    assert (found["oneDNN"].state == OK) == packing.available()
    monkeypatch.setattr(packing, "available", lambda: False)
    assert by_name(doctor_machine.check_kernels())["oneDNN"].state == ABSENT


def test_a_scheme_that_does_not_run_says_why(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torchao" else real(name, *more)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_name(doctor_machine.quantization())
    assert found["quantization int8"].fix == "pip install 'sana-python[torchao]'"
    assert found["quantization fp8"].state == ABSENT and "compute capability 9.0" in found["quantization fp8"].text
    assert found["quantization fp8"].fix is None


def test_compilation_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = doctor_machine.compiler()
    assert finding.state == ABSENT and finding.fix and finding.data["modes"] == ["off"]
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert doctor_machine.compiler().data["modes"] == ["off", "regional"]
