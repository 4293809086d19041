"""A run as JSON and as Markdown, and both on the disk. The picture is drawn in `plots.py`; nothing is measured here."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from tools.bench.results import CaseResult, Report, Timing, quartiles
from tools.bench.roofline import ideal_seconds
from tools.bench.targets import UNMEASURED, Answer, answers

OTHER_DEVICE = "not measured yet"
TITLES = {
    "end_to_end": "End to end: prompt to picture",
    "block_stack": "Block stack",
    "training_step": "Training step",
    "memory": "Memory",
    "dit": "Transformer forward",
    "operators": "Operators",
    "scaling": "Tokens against time",
    "loader": "Data loader",
}


def write(report: Report, folder: Path, stem: str) -> list[Path]:
    """Writes STEM.json and STEM.md, each whole or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    for path, content in zip(paths, (text, markdown(report, stem)), strict=True):
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    return paths


def read(path: Path) -> Report:
    """Reads what `write` wrote.

    Raises:
        ValueError: it is of another version.
    """
    return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))


def markdown(report: Report, stem: str) -> str:
    """The whole report."""
    about = report.environment
    lines = [f"# Benchmarks: {about['name']}, {about['cores']} cores", "", *_environment(report), ""]
    lines += [f"![the same as a picture]({stem}.png)", "", "## Targets", "", *targets_table(report), ""]
    for part in dict.fromkeys(case.part for case in report.cases):
        done = [case for case in report.cases if case.part == part and case.status == "measured"]
        if done:
            lines += [f"## {TITLES.get(part, part)}", "", *part_table(report, part, done), ""]
    left_out = [case for case in report.cases if case.status != "measured" or case.reason]
    if left_out:
        lines += ["## Not measured, failed, or cut short", ""]
        lines += [f"- {case.part}, {case.name}: {case.status}. {case.reason}" for case in left_out]
        lines += [""]
    lines += _legend()
    return "\n".join(lines) + "\n"


def targets_table(report: Report) -> list[str]:
    """One line a target, those that this machine cannot measure included."""
    rows = [["work", "against", "measured", "by process CPU time", "target", "verdict"]]
    for answer in answers(report):
        here = answer.target.device == report.environment["device"]
        status = answer.status if here else OTHER_DEVICE
        measured = _measured(answer)
        if answer.status == UNMEASURED and answer.detail and here:
            status = f"{status}: {answer.detail}"
        elif answer.detail:
            measured = f"{measured} ({answer.detail})"
        by_cpu = answer.target.words(answer.cpu_value) if math.isfinite(answer.cpu_value) and here else ""
        if answer.target.device != "cpu":
            by_cpu = ""
        rows.append([answer.target.work, answer.target.against, measured, by_cpu, answer.target.goal, status])
    return table(rows)


def _measured(answer: Answer) -> str:
    if not math.isfinite(answer.value) or answer.status == UNMEASURED:
        return ""
    return answer.target.words(answer.value)


def part_table(report: Report, part: str, cases: Sequence[CaseResult]) -> list[str]:
    """All sides of the measured cases of a part, one line each."""
    kernels = part in ("operators", "scaling")
    head = [
        "case",
        "side",
        "median",
        "quartiles",
        "ours is faster by",
        "by CPU time",
        "RMS ratio to ours",
        "peak memory",
    ]
    extra = ["GB/s", "TFLOP/s", "of the roofline"] if kernels else []
    extra += ["images/s"] if any(case.images for case in cases) else []
    rows = [head + extra]
    for case in cases:
        for name, timing in case.timings.items():
            row = _common(case, name, timing)
            if kernels:
                row += _speeds(report, case, timing)
            if any(one.images for one in cases):
                row.append(f"{case.images / statistics.median(timing.wall):.3g}" if _has_speed(case) else "")
            rows.append(row)
    return table(_without_empty_columns(rows))


def _has_speed(case: CaseResult) -> bool:
    return bool(case.images) and "memory_only" not in case.facts


def _common(case: CaseResult, name: str, timing: Timing) -> list[str]:
    first, timed = name == case.ours, "memory_only" not in case.facts
    low, high = quartiles(timing.wall)
    check = case.checks.get(name)
    return [
        case.name if first else "",
        name,
        seconds(statistics.median(timing.wall)) if timed else "",
        f"{seconds(low)} to {seconds(high)}" if timed else "",
        f"{case.ratio(name):.2f}x" if timed and not first else "",
        f"{case.ratio(name, 'cpu'):.2f}x" if timed and not first and not timing.gpu else "",
        f"{check.rms_ratio:.1e} (allowed {check.tolerance:.0e})" if check else "",
        f"{timing.peak_bytes / 2**20:.0f} MiB" if timing.gpu or case.part == "memory" else "",
    ]


def _speeds(report: Report, case: CaseResult, timing: Timing) -> list[str]:
    median = statistics.median(timing.wall)
    ideal = ideal_seconds(report.roofline, case.bytes, case.flops, case.facts.get("dtype", "fp32"))
    counted = bool(case.bytes) and not case.name.startswith("attention on")  # there the sides do different work
    return [
        f"{case.bytes / median / 1e9:.3g}" if counted else "",
        f"{case.flops / median / 1e12:.3g}" if counted and case.flops else "",
        f"{ideal / median:.0%}" if counted and math.isfinite(ideal) else "",
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up; the first row is the head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 0.9995 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    return ""


def summary(report: Report) -> str:
    """What stands last on the screen: all measured cases, then the targets."""
    lines: list[str] = []
    for part in dict.fromkeys(case.part for case in report.cases):
        done = [case for case in report.cases if case.part == part and case.status == "measured"]
        lines += [*part_table(report, part, done), ""] if done else []
    lines += [f"{case.status}: {case.part}, {case.name}: {case.reason}" for case in report.cases
              if case.status != "measured"]  # fmt: skip
    return "\n".join([*lines, "", *targets_table(report)])


def _environment(report: Report) -> list[str]:
    about, limits = report.environment, report.roofline
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    installed = {name: about["versions"][name] for name in about["locked"]}
    strange = [
        f"{name} {installed[name]} instead of {locked}"
        for name, locked in about["locked"].items()
        if installed[name].split("+")[0] != locked.split("+")[0]
    ]
    machine = f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['memory_gib']} GiB"
    if about["device"] != "cpu":
        machine = f"{about['name']}, {about['gpu_memory_gib']} GiB, CUDA {about['cuda']}; {machine}"
    rows = [
        ["machine", f"{machine}; {about['system']}"],
        ["versions", f"python {about['python']}, {versions}"],
        ["differs from requirements.lock", ", ".join(strange) or "nothing"],
        ["date, commit", f"{about['date']}, {about['commit']}"],
        ["command", f"`{about['command']}`"],
        ["took", f"{report.seconds:.0f} s; load of the machine {about['load_before']} before, "
         f"{about.get('load_after', 'unknown')} after"],
    ]  # fmt: skip
    if "bandwidth" in limits:
        words = [f"{limits['bandwidth'] / 1e9:.0f} GB/s"]
        words += [f"{limits[name] / 1e12:.3g} TFLOP/s in {name}" for name in ("fp32", "bf16") if name in limits]
        rows.append(["roofline", f"{', '.join(words)} ({limits['source']})"])
    else:
        rows.append(["roofline", str(limits["source"])])
    return table([["", ""], *rows])


def _legend() -> list[str]:
    return [
        "Sides run in turn, A, B, A, B, ...; a ratio is the median over the rounds of the other side's time divided by "
        "ours. Results are compared before anything is timed: RMS(ours - other) / RMS(other). Peak memory is what is "
        "allocated on the GPU, or in the part Memory the resident memory of a process that holds one side only.",
    ]


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    kept = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    return [[row[index] for index in kept] for row in rows]
