"""Reports of the benchmarks: JSON there and back, a Markdown file that leaves nothing out, targets, the picture."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.tools.bench_reports import full_report, timing
from tools.bench import environment, plots, report, roofline, suites
from tools.bench.networks import forward_flops
from tools.bench.results import CaseResult, Check, Report, quartiles
from tools.bench.targets import MISSED, REACHED, TARGETS, UNMEASURED, answers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_json_there_and_back(tmp_path, device):
    made = full_report(device)
    path, _ = report.write(made, tmp_path, "made-up")
    back = report.read(path)
    worst = made.cases[-1].checks["b"]
    assert math.isnan(back.cases[-1].checks["b"].rms_ratio) and not worst.passed  # JSON has neither NaN nor infinity
    made.cases[-1] = replace(made.cases[-1], checks={})
    back.cases[-1] = replace(back.cases[-1], checks={})
    assert back == made
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_json_says_ratios_and_is_strict(tmp_path):
    path, _ = report.write(full_report(), tmp_path, "made-up")
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    first = content["cases"][0]
    assert content["schema"] == 1
    assert first["ratios"]["diffusers"]["wall"] == pytest.approx([2.0] * 3)
    assert first["ratios"]["diffusers"]["cpu_median"] == pytest.approx(2.0)
    assert first["timings"]["ours"]["quartiles"] == pytest.approx([0.095, 0.11])
    assert content["environment"]["commit"] == "0123456789ab"


def test_a_file_of_another_version_is_refused(tmp_path):
    content = full_report().to_dict() | {"schema": 0}
    (tmp_path / "old.json").write_text(json.dumps(content, default=str))
    with pytest.raises(ValueError, match="schema 0"):
        report.read(tmp_path / "old.json")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_markdown_leaves_nothing_out(device):
    made = full_report(device)
    text = report.markdown(made, "made-up")
    for case in made.cases:
        assert case.name.replace("|", "\\|") in text, case.name
        for name in case.timings:
            assert name in text
        if case.status != "measured":
            assert f"{case.status}. {case.reason}" in text
    for target in TARGETS:
        assert target.work in text and target.goal in text
    for value in ("2026-01-01", "0123456789ab", "python -m tools.bench", "torch 2.11.0+cu130", "made-up.png"):
        assert value in text
    assert "diffusers 0.42.1 instead of 0.42.0" in text and "torch 2.11.0+cu130 instead" not in text
    for block in text.split("\n\n"):  # every table is rectangular
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines() if line.startswith("|")}) <= 1
    other = "cuda" if device == "cpu" else "cpu"
    assert text.count("not measured yet") == sum(target.device == other for target in TARGETS)


def test_targets_are_reached_or_not():
    by_ratio = {1.0: MISSED, 1.79: MISSED, 2.6: REACHED}
    for ratio, status in by_ratio.items():
        stack = [one for one in answers(full_report("cpu", ratio)) if one.target.key == "block_stack.fp32.1024"]
        assert [(one.status, one.value) for one in stack] == [(status, pytest.approx(ratio))]


def test_every_target_of_the_device_is_answered_and_no_other():
    for device in ("cpu", "cuda"):
        for answer in answers(full_report(device, 3.0)):
            assert answer.status == (REACHED if answer.target.device == device else UNMEASURED), answer


def test_seconds_count_on_the_named_gpu_only():
    made = full_report("cuda")
    a100 = Report(made.suite, made.environment | {"name": "NVIDIA A100"}, made.roofline, made.cases)
    absolute = [one for one in answers(a100) if one.target.on]
    assert [one.status for one in absolute] == [UNMEASURED] * 2
    assert "0.1 s on another GPU" in report.markdown(a100, "a100")


def test_the_share_of_the_roofline_is_that_of_the_worst_large_shape():
    made = full_report("cuda")
    slow = CaseResult("operators", "slow", "linear_attention.forward", "measured", bytes=0.05e12,
                      timings={"ours (Triton)": timing(0.1, gpu=True)})  # fmt: skip
    made.cases.append(slow)
    found = next(one for one in answers(made) if one.target.key == "linear_attention.forward")
    assert (found.status, found.value) == (MISSED, pytest.approx(0.5))


def test_throughput_compares_the_best_batches():
    made = full_report("cuda")
    cases = [case for case in made.cases if case.key != "throughput.0.6B"]
    for batch, ours, theirs in ((4, 1.0, 2.0), (16, 2.0, 5.0), (32, 16.0, 8.0)):
        sides = {"ours": timing(ours), "diffusers": timing(theirs)}
        cases.append(CaseResult("end_to_end", f"batch {batch}", "throughput.0.6B", "measured", timings=sides,
                                images=batch, facts={"batch": batch}))  # fmt: skip
    found = next(one for one in answers(replace(made, cases=cases)) if one.target.key == "throughput.0.6B")
    assert found.value == pytest.approx((16 / 2) / (32 / 8))


def test_a_failed_case_answers_no_target():
    made = full_report()
    cases = [replace(case, status="failed", timings={}, reason="not timed") for case in made.cases]
    assert all(answer.status == UNMEASURED for answer in answers(replace(made, cases=cases)))
    assert "not measured: not timed" in report.markdown(replace(made, cases=cases), "x")


@pytest.mark.parametrize("device", ["cpu", "cuda", "empty"])
def test_the_picture_is_written(tmp_path, device):
    pytest.importorskip("matplotlib")
    made = full_report("cpu" if device == "empty" else device)
    if device == "empty":
        made = replace(made, cases=[])
    plots.draw(made, tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert picture.shape == (1050, 1500, 3)
    bars = (np.abs(picture.astype(int) - [0x1F, 0x5F, 0xA8]).sum(-1) < 12).sum()
    assert (bars > 5000) == (device != "empty")
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(plots.PlotError, match=r"sana-python\[plot\]"):
        plots.draw(full_report(), tmp_path / "x.png")


def test_numbers_are_readable():
    assert [report.seconds(value) for value in (12.3456, 0.9996, 0.0123, 4.5e-6)] == [
        "12.3 s", "1 s", "12.3 ms", "4.5 us",
    ]  # fmt: skip
    assert quartiles([7.0]) == [7.0, 7.0]
    assert report.table([["a", "b|c"], ["dd", ""]]) == ["| a  | b\\|c |", "|----|------|", "| dd |      |"]


def test_machines_have_names_for_files():
    amd = {"name": "AMD EPYC", "vendor": "AuthenticAMD", "family": 26, "model": 2}
    assert environment.slug(amd, 2) == "amd-zen5-2-cores"
    assert environment.slug(amd | {"family": 25, "model": 17}, 1) == "amd-zen4-1-core"
    intel = {
        "name": "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.0GHz",
        "vendor": "GenuineIntel",
        "family": 6,
        "model": 143,
    }
    assert environment.slug(intel, 56) == "intel-xeon-platinum-8480-plus-56-cores"
    assert environment.as_slug("NVIDIA H200") == "nvidia-h200"


def test_the_environment_is_complete():
    found = environment.collect("cpu", ["--suite", "cpu"])
    assert found["command"] == "python -m tools.bench --suite cpu"
    assert found["cores"] >= 1 and found["cpu"] and found["versions"]["torch"].startswith("2.")
    assert set(found["locked"]) <= set(environment.PACKAGES) and "diffusers" in found["locked"]
    assert json.loads(json.dumps(found)) == found


def test_rooflines():
    assert roofline.of_device("cuda", "NVIDIA H200")["bandwidth"] == 4.8e12
    assert roofline.of_device("cuda", "NVIDIA H100 PCIe")["bandwidth"] == 2.0e12
    assert "bandwidth" not in roofline.of_device("cuda", "NVIDIA GeForce")
    assert roofline.ideal_seconds({"bandwidth": 1e9, "fp32": 1e9}, 2e9, 1e9, "fp32") == 2
    assert roofline.ideal_seconds({"bandwidth": 1e9, "fp32": 1e9}, 2e9, 5e9, "fp32") == 5
    assert math.isnan(roofline.ideal_seconds({"source": "unknown"}, 1, 1, "fp32"))
    probed = roofline.probe_cpu(2**20, 64, rounds=1)
    assert all(probed[name] > 0 for name in ("bandwidth", "fp32", "bf16"))


def test_every_part_of_the_registry_resolves():
    assert all(callable(suites.PARTS[name]) for name in suites.PARTS)
    assert Check(1e-6, 1e-5).passed


def test_the_counted_operations_in_the_document():
    text = (environment.ROOT / "asset/docs/performance.md").read_text(encoding="utf-8")
    for model in ("0.6B", "1.6B"):
        cells = [f"{forward_flops(model, pixels) / 1e9:,.0f} GFLOP" for pixels in (512, 1024, 2048, 4096)]
        assert f"| {model} | {' | '.join(cells)} |" in text
