"""A made-up report in which every target of a device has a measurement. No test is here."""

from tools.bench.results import CaseResult, Check, Report, Timing
from tools.bench.targets import ROOFLINE, TARGETS

PEAK = {"bandwidth": 1e12, "fp32": 5e13, "bf16": 1e15, "source": "made up"}


def timing(seconds, *, gpu=False, scale=(1.0, 0.9, 1.2)):
    wall = [seconds * factor for factor in scale]
    return Timing(wall, [2 * one for one in wall], wall if gpu else [], peak_bytes=3 * 2**20)


def full_report(device="cpu", ratio=2.0):
    """Every target's other side takes `ratio` times as long as ours; ours takes 0.1 s."""
    gpu = device != "cpu"
    environment = {
        "device": device, "name": "NVIDIA H200" if gpu else "AMD EPYC", "slug": "made-up", "cpu": "AMD EPYC",
        "cores": 2, "threads": 2, "memory_gib": 23.0, "load_before": 0.1, "load_after": 2.0, "system": "Linux x86_64",
        "python": "3.11", "versions": {"torch": "2.11.0+cu130", "diffusers": "0.42.1"},
        "locked": {"torch": "2.11.0", "diffusers": "0.42.0"}, "date": "2026-01-01 00:00 UTC", "commit": "0123456789ab",
        "command": "python -m tools.bench", "gpu_memory_gib": 139.0, "cuda": "13.0",
    }  # fmt: skip
    cases = []
    for target in TARGETS:
        if target.device != device or target.side == "":
            continue
        part = target.key.partition(".")[0]
        if target.side == ROOFLINE:
            name = f"linear attention {target.key.partition('.')[2]}, bf16, 1024 px"
            sides = {"ours (Triton)": timing(0.1, gpu=True), "eager": timing(0.1 * ratio, gpu=True)}
            case = CaseResult("operators", name, target.key, "measured", checks={"eager": Check(1e-3, 5e-3, "near")},
                              timings=sides, facts={"dtype": "bf16"}, bytes=0.08e12, flops=1e12)  # fmt: skip
        else:
            sides = {"ours": timing(0.1, gpu=gpu), target.side: timing(0.1 * ratio, gpu=gpu)}
            part = {"throughput": "end_to_end"}.get(part, part)
            case = CaseResult(part, f"{target.work} | {target.side}", target.key, "measured", timings=sides,
                              checks={target.side: Check(2e-7, 1e-5)}, facts={"batch": 4}, images=4)  # fmt: skip
        cases.append(case)
    for tokens, seconds in ((256, 0.001), (1024, 0.01), (4096, 0.1)):
        sides = {"linear attention": timing(tokens * 1e-6), "softmax attention": timing(seconds)}
        cases.append(CaseResult("scaling", f"attention on {tokens} tokens", "scaling", "measured", timings=sides,
                                facts={"tokens": tokens, "dtype": "fp32"}, bytes=1e6))  # fmt: skip
    for pixels in (512, 1024):
        sides = {"ours": timing(pixels / 1000), "diffusers": timing(ratio * pixels / 1000)}
        cases.append(CaseResult("dit", f"DiT forward 0.6B, fp32, {pixels} px", "", "measured", timings=sides))
    for name in ("linear attention", "mix ffn"):
        sides = {"ours": timing(0.1), "eager": timing(0.2), "torch.compile": timing(0.15)}
        cases.append(CaseResult("operators", f"{name} forward, fp32, 0.6B, 1024 px, batch 1", "", "measured",
                                timings=sides, facts={"dtype": "fp32"}, bytes=0.04e12, flops=1e12))  # fmt: skip
    cases.append(
        CaseResult("memory", "process start", "", "measured", timings={"ours": timing(1), "diffusers": timing(2)})
    )
    cases.append(CaseResult("loader", "files", "", "skipped", "needs about 3 s, and 0 s were left"))
    cases.append(CaseResult("loader", "features", "", "failed", "not timed: the results differ",
                            checks={"b": Check(float("inf"), 1e-5)}))  # fmt: skip
    return Report("gpu" if gpu else "cpu", environment, PEAK, cases, 12.5)
