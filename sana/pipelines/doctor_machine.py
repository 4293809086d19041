"""Devices, number formats and kernels of this machine, each with the reason for which it is used or not."""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from sana.models.quantization.kernels import require
from sana.models.quantization.schemes import SCHEMES
from sana.ops import backend, packing
from sana.pipelines.doctor import ABSENT, OK, Finding, amount, one_line

ONEDNN = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight")


def check_devices() -> Iterator[Finding]:
    """The CPU, CUDA devices, MPS, and what a pipeline takes of them when nothing is said."""
    yield cpu()
    yield from cuda()
    mps = torch.backends.mps.is_available()
    reason = "usable with device='mps'; not tested" if mps else "none: " + why_no_mps()
    yield Finding("devices", "mps", OK if mps else ABSENT, reason, None, {"available": mps})
    gpu = torch.cuda.is_available()
    text = (
        "cuda, in the precision of the model's config"
        if gpu
        else "cpu in fp32: there is no CUDA device, and fp32 is exact; --dtype=bf16 halves memory"
    )
    data = {"device": "cuda" if gpu else "cpu", "dtype": "config" if gpu else "fp32"}
    yield Finding("devices", "default", OK, text, None, data)


def cpu() -> Finding:
    """The processor, its cores and memory, and what it does with bf16."""
    memory = total_memory()
    features = cpu_features()
    bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    hardware = [name for name in ("amx", "avx512_bf16") if features.get(name)]
    speed = f"by {', '.join(hardware)}" if hardware else "without instructions of its own: it saves memory, not time"
    name, cores, threads = cpu_name(), os.cpu_count() or 1, torch.get_num_threads()
    held = amount(memory) if memory else "an unknown amount"
    capability = torch.backends.cpu.get_cpu_capability()
    text = (
        f"{name}, {cores} logical cores ({threads} threads used), {held} of memory, {capability}; "
        f"dtypes fp32, bf16 ({speed if bf16 else 'not in oneDNN on this CPU: slow'}), fp16 (slow)"
    )
    data = {
        "name": name, "cores": cores, "threads": threads, "memory": memory, "capability": capability,
        "onednn_bf16": bf16, **features,
    }  # fmt: skip
    return Finding("devices", "cpu", OK, text, None, data)


def cpu_name() -> str:
    """Returns the processor's name as Linux gives it, else as Python does."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cpu_features() -> dict[str, bool]:
    """Returns which instructions for 16-bit numbers there are, as far as this PyTorch can tell."""
    asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    return {name: bool(getattr(torch.cpu, call)()) for name, call in asked.items() if hasattr(torch.cpu, call)}


def total_memory() -> int:
    """Returns the machine's memory in bytes, 0 where it is not known."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cuda() -> Iterator[Finding]:
    """Each CUDA device, or the reason for which there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            reason = "this PyTorch is built without CUDA"
        elif shutil.which("nvidia-smi") is None:
            reason = f"no NVIDIA driver (PyTorch is built for CUDA {built})"
        else:
            reason = f"the driver shows no device that PyTorch for CUDA {built} can use; see nvidia-smi"
        yield Finding("devices", "cuda", ABSENT, f"none: {reason}", None, {"built_for": built, "devices": 0})
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        bf16 = found.major >= 8
        dtypes = "fp32, fp16, bf16" if bf16 else "fp32, fp16 (bf16 needs compute capability 8.0)"
        text = f"{found.name}, {amount(found.total_memory)}, compute capability {found.major}.{found.minor}; {dtypes}"
        data = {
            "name": found.name, "memory": found.total_memory, "capability": [found.major, found.minor], "bf16": bf16,
            "built_for": torch.version.cuda,
        }  # fmt: skip
        yield Finding("devices", f"cuda:{index}", OK, text, None, data)


def why_no_mps() -> str:
    """Returns why there is no MPS device."""
    return "this Mac has no usable GPU" if torch.backends.mps.is_built() else "this PyTorch is built without it"


def check_kernels() -> Iterator[Finding]:
    """What computes the operators, and why; oneDNN, packed weights, Triton, quantisation, compilation."""
    with torch.no_grad():
        inference = backend.choose("auto", torch.empty(1))
    with torch.enable_grad():
        training = backend.choose("auto", torch.empty(1))
    text = (
        f"{inference!r}: arranged for a CPU without gradients; with gradients and on GPUs {training!r}, PyTorch's own"
    )
    yield Finding("kernels", "operators", OK, text, None, {"cpu_inference": inference, "otherwise": training})
    names = {name: hasattr(torch.ops.mkldnn, name) for name in ONEDNN}
    packed = packing.available()
    text = "linear layers and convolutions of fp32 and bf16 on a CPU, with weights packed once"
    if not packed:
        text = f"PyTorch's own layers compute on a CPU: this PyTorch lacks {', '.join(missing(names)) or 'oneDNN'}"
    yield Finding("kernels", "oneDNN", OK if packed else ABSENT, text, None, {"available": packed, **names})
    budget = packing.pack_budget()
    text = f"at most {amount(budget)} of copies in oneDNN's layout: a quarter of the memory, 4 GiB at most"
    yield Finding("kernels", "packed weights", OK, text, None, {"budget": budget})
    yield triton()
    yield from quantization()
    yield compiler()


def missing(names: dict[str, bool]) -> list[str]:
    """Returns the names that are not there."""
    return [name for name, there in names.items() if not there]


def triton() -> Finding:
    """Whether Triton kernels can run here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        backend.require_triton(torch.empty(1, device=device))
    except backend.TritonUnavailableError as error:
        return Finding("kernels", "triton", ABSENT, one_line(error), None, {"usable": False})
    how = "by its interpreter (TRITON_INTERPRET=1)" if backend.interpreting() else "on CUDA devices"
    text = f"usable {how}, where a config asks for them (attn_type triton_linear, ffn_type triton_mbconvpreglu)"
    return Finding("kernels", "triton", OK, text, None, {"usable": True, "interpreted": backend.interpreting()})


def quantization() -> Iterator[Finding]:
    """Which schemes of weights run on the device that a pipeline takes, and why the others do not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, scheme in SCHEMES.items():
        try:
            require(name, device)
        except ValueError as error:
            extra = f"pip install 'sana-python[{scheme.extra}]'" if "not installed" in str(error) else None
            yield Finding("kernels", f"quantization {name}", ABSENT, one_line(error), extra, {"usable": False})
        else:
            text = f"usable on {device}: {scheme.what}" + (f" by {scheme.package}" if scheme.package else "")
            yield Finding("kernels", f"quantization {name}", OK, text, None, {"usable": True})


def compiler() -> Finding:
    """Whether torch.compile can make code for the CPU, and graphs can be captured."""
    found = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)
    gpu = torch.cuda.is_available()
    modes = ["off", *(["regional"] if found or gpu else []), *(["graph", "max"] if gpu else [])]
    text = f"--compile={'|'.join(modes)}"
    if not gpu:
        text += "; graph and max need a CUDA device" + ("" if found else ", regional a C++ compiler")
    fix = None if found or gpu else "apt-get install g++"
    return Finding("kernels", "compile", OK if fix is None else ABSENT, text, fix, {"compiler": found, "modes": modes})
