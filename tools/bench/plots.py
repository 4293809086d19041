"""The picture of a run: ratios, tokens against time, operators beside the roofline, throughput. Needs matplotlib."""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.bench.report import OTHER_DEVICE
from tools.bench.results import CaseResult, Report
from tools.bench.roofline import ideal_seconds
from tools.bench.targets import REACHED, ROOFLINE, SMALL, UNMEASURED, answers

OURS, THEIRS, THIRD, INK, GRID = "#1f5fa8", "#d1601f", "#2b8a4b", "#333333", "#dddddd"
COLOURS = (OURS, THEIRS, THIRD, "#8b4fa3", "#b3922a", "#4a9db0")


class PlotError(RuntimeError):
    """The picture cannot be drawn; one sentence for the user."""


def draw(report: Report, path: Path) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('matplotlib is not installed: pip install "sana-python[plot]".') from error
    panels = _panels(report)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(15, 5.25 * max(rows, 1.2)), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, 2).flat)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(places, panels, strict=False):
        panel(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
        axes.set_axisbelow(True)
    about = report.environment
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "diffusers"))
    figure.suptitle(
        f"{about['name']}, {about['cores']} cores, {versions}, commit {about['commit']}, {about['date']}",
        x=0.01, ha="left", color=INK, fontsize=11,
    )  # fmt: skip
    temporary = path.with_name(f".{path.name}.part.png")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _panels(report: Report) -> list[Callable[[Any, Report], None]]:
    """What is drawn, in reading order: of a run of the part scaling alone, nothing else."""
    scaling = [_scaling, *([_per_token] if _by_pixels(report) else [])]
    if report.cases and all(case.part == "scaling" for case in report.cases):
        return scaling
    return [_targets, *scaling[:1], _operators, _last, *scaling[1:]]


def _targets(axes: Any, report: Report) -> None:
    """Bars of the ratios that have a target, with the target as a line across each."""
    axes.set_title("Targets: how many times faster than diffusers (line: target)", loc="left", color=INK)
    shown = [
        answer for answer in answers(report)
        if answer.status != UNMEASURED and answer.target.side not in ("", ROOFLINE, SMALL)
    ]  # fmt: skip
    if not shown:
        _empty(axes)
        return
    places = range(len(shown))
    colours = [OURS if answer.status == REACHED else "#9db8d6" for answer in shown]
    axes.barh(places, [answer.value for answer in shown], color=colours, height=0.6)
    for place, answer in zip(places, shown, strict=True):
        goal, size = answer.target.ratio, f"{answer.value:.2f}x, {answer.status}"
        axes.plot([goal, goal], [place - 0.42, place + 0.42], color=THEIRS, linewidth=2.5)
        axes.text(max(answer.value, goal), place, f"  {size}", va="center", color=INK, fontsize=9)
    axes.set_yticks(places, [f"{_wrapped(answer.target.work)}\nagainst {answer.target.against}" for answer in shown])
    axes.invert_yaxis()
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_xlim(0, 1.45 * max(max(answer.value, answer.target.ratio) for answer in shown))
    axes.grid(axis="x", color=GRID, linewidth=0.7)


def _scaling(axes: Any, report: Report) -> None:
    """Time of both kinds of attention by the number of tokens."""
    axes.set_title("Attention alone: tokens against time", loc="left", color=INK)
    cases = sorted(report.find("scaling"), key=lambda case: case.facts["tokens"])
    if not cases:
        _empty(axes)
        return
    for name, colour in zip(cases[0].timings, COLOURS, strict=False):
        tokens = [case.facts["tokens"] for case in cases]
        times = [1e3 * statistics.median(case.timings[name].wall) for case in cases]
        axes.plot(tokens, times, marker="o", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    labels = [f"{case.facts['tokens']}\n{32 * math.isqrt(case.facts['tokens'])} px" for case in cases]
    axes.set_xticks([case.facts["tokens"] for case in cases], labels)
    axes.set_xlabel("tokens, and the image they make", color=INK)
    axes.set_ylabel("ms", color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.legend(frameon=False, labelcolor=INK)


def _by_pixels(report: Report) -> list[CaseResult]:
    return [case for case in report.cases if case.timings and "pixels" in case.facts]


def _per_token(axes: Any, report: Report) -> None:
    """Time of one latent token in the transformer by the size of the image, with either attention."""
    cases = _by_pixels(report)
    blocks = cases[0].facts["blocks"]
    title = f"DiT of {blocks} block{'s'[: blocks > 1]}: time of one latent token (dashed: 15 % above 1024 px)"
    axes.set_title(title, loc="left", color=INK)
    sizes = sorted(cases[0].facts["pixels"])
    tokens = [(pixels // 32) ** 2 for pixels in sizes]
    linear = iter((OURS, THIRD))
    for case in cases:
        colour = THEIRS if case.key.startswith("scaling.softmax") else next(linear)
        # every side makes as many tokens as the largest image has
        times = [1e6 * statistics.median(case.timings[f"{pixels} px"].wall) / tokens[-1] for pixels in sizes]
        label = f"{case.facts['attention']}, {case.facts['dtype']}"
        axes.plot(tokens, times, marker="o", color=colour, label=label)
        axes.annotate(f"{times[-1]:.3g}", (tokens[-1], times[-1]), (6, -3), textcoords="offset points", color=INK)
        if case.key.startswith("scaling.linear") and SMALL in case.timings:
            limit = 1.15 * times[sizes.index(1024)]
            axes.plot([1024, tokens[-1]], [limit, limit], color=colour, linewidth=1, linestyle="--")
    if sizes[0] == 512:
        note = "512 px: 256 tokens share what every call costs\nand the reading of all weights"
        axes.annotate(note, (0.02, 0.34), xycoords="axes fraction", color=INK, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count}\n{pixels} px" for count, pixels in zip(tokens, sizes, strict=True)])
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.margins(x=0.08)
    axes.set_xlabel("latent tokens, and the image they make", color=INK)
    axes.set_ylabel("us a token", color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")


def _operators(axes: Any, report: Report) -> None:
    """How much of the device's limit every form of every operator reaches."""
    axes.set_title("Operators: share of the roofline (first shape of each)", loc="left", color=INK)
    seen: dict[str, CaseResult] = {}
    for case in report.cases:
        if case.part == "operators" and case.status == "measured":
            kind = case.name.rsplit(",", case.name.count(",") - 1)[0]  # operator, direction and dtype
            seen.setdefault(kind, case)
    if not seen or "bandwidth" not in report.roofline:
        _empty(axes)
        return
    names = list(dict.fromkeys(name for case in seen.values() for name in case.timings))
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places, shares = [], []
        for place, case in enumerate(seen.values()):
            if name in case.timings:
                ideal = ideal_seconds(report.roofline, case.bytes, case.flops, case.facts["dtype"])
                places.append(place + (number - (len(names) - 1) / 2) * height)
                shares.append(100 * ideal / statistics.median(case.timings[name].wall))
        axes.barh(places, shares, height=0.9 * height, color=COLOURS[number % len(COLOURS)], label=name)
    axes.set_yticks(range(len(seen)), list(seen))
    axes.invert_yaxis()
    axes.set_xlabel("% of the time that the bytes and operations need at least", color=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _last(axes: Any, report: Report) -> None:
    """Throughput by batch where it was measured; else the transformer's forward."""
    by_batch = sorted(report.find("throughput.0.6B"), key=lambda case: case.facts["batch"])
    if by_batch:
        axes.set_title("0.6B, 1024 px, 20 steps with CFG: throughput by batch", loc="left", color=INK)
        rates = [[case.images / statistics.median(one.wall) for one in case.timings.values()] for case in by_batch]
        _grouped(axes, [str(case.facts["batch"]) for case in by_batch], rates, list(by_batch[0].timings), "images/s")
        axes.set_xlabel("batch", color=INK)
        return
    axes.set_title("Transformer forward", loc="left", color=INK)
    cases = [case for case in report.cases if case.part == "dit" and case.status == "measured"]
    if not cases:
        _empty(axes)
        return
    times = [[statistics.median(one.wall) for one in case.timings.values()] for case in cases]
    labels = [case.name.removeprefix("DiT forward ").replace(", ", "\n").replace(" of ", "/") for case in cases]
    _grouped(axes, labels, times, list(cases[0].timings), "s")


def _grouped(
    axes: Any, labels: Sequence[str], values: Sequence[Sequence[float]], names: Sequence[str], unit: str
) -> None:
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(labels))]
        bars = axes.bar(places, [row[number] for row in values], width=0.9 * width, color=COLOURS[number], label=name)
        axes.bar_label(bars, fmt="%.3g", color=INK, fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(unit, color=INK)
    axes.margins(y=0.12)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.legend(frameon=False, labelcolor=INK)


def _empty(axes: Any) -> None:
    axes.text(0.5, 0.5, OTHER_DEVICE, transform=axes.transAxes, ha="center", va="center", color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def _wrapped(text: str, width: int = 46) -> str:
    lines = [""]
    for word in text.split(" "):
        lines = [*lines, word] if len(lines[-1]) + len(word) >= width else [*lines[:-1], f"{lines[-1]} {word}".strip()]
    return "\n".join(lines)
