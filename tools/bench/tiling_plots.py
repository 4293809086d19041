"""The picture of `tools.bench.tiling`: memory and time by size of the tiles, and errors. Nothing is measured here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench.plots import COLOURS, GRID, INK, PlotError

MARKERS = {"decode": "o", "encode": "s"}
LINES = ("-", "--", ":", "-.")


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG.

    Args:
        content: what the JSON file holds.
        path: of the PNG.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('matplotlib is not installed: pip install "sana-python[plot]".') from error
    curves, about = content["curves"], content["environment"]
    networks = list(dict.fromkeys(curve["network"] for curve in curves))
    figure = Figure(figsize=(15, 4.6 * len(networks)), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(networks), 3, squeeze=False)
    for row, network in zip(rows, networks, strict=True):
        own = [curve for curve in curves if curve["network"] == network]
        _lines(row[0], own, "peak_bytes", f"{network}: peak above weights and input, MiB", 2**-20)
        _lines(row[1], own, "seconds", f"{network}: seconds", 1.0)
        _errors(row[2], own, f"{network}: RMS of tiles against the whole run")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "diffusers"))
    figure.suptitle(
        f"{about['name']}, {about['cores']} cores, {versions}, commit {about['commit']}, {about['date']}",
        x=0.01, ha="left", color=INK, fontsize=11,
    )  # fmt: skip
    figure.savefig(path)


def _points(curve: Mapping[str, Any], side: str, *, whole: bool = True) -> list[Mapping[str, Any]]:
    found = [point for point in curve["points"] if point["side"] == side and (whole or point["tile"])]
    return sorted(found, key=lambda point: point["tile"] or curve["pixels"])


def _lines(axes: Any, curves: Sequence[Mapping[str, Any]], what: str, title: str, unit: float) -> None:
    """One line a curve; its last point is the whole image at once. Crosses are diffusers' own tiles."""
    sizes = list(dict.fromkeys(curve["pixels"] for curve in curves))
    for curve in curves:
        colour, line = COLOURS[sizes.index(curve["pixels"]) % len(COLOURS)], LINES[curve["direction"] != "decode"]
        points = _points(curve, "ours")
        axes.plot(
            [point["tile"] or curve["pixels"] for point in points], [point[what] * unit for point in points],
            line, marker=MARKERS[curve["direction"]], color=colour, label=f"{curve['direction']} {curve['pixels']} px",
        )  # fmt: skip
        theirs = _points(curve, "diffusers")
        axes.plot(
            [point["tile"] or curve["pixels"] for point in theirs], [point[what] * unit for point in theirs],
            "x", color=colour, markersize=8, markeredgewidth=2,
        )  # fmt: skip
    ticks = sorted({point["tile"] or curve["pixels"] for curve in curves for point in curve["points"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_xlabel("pixels that a tile makes, along a side; last: whole (crosses: diffusers)", color=INK)
    _finish(axes, title)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _errors(axes: Any, curves: Sequence[Mapping[str, Any]], title: str) -> None:
    """Ours at the worst tile and diffusers' beside each other; bitwise equal runs stand at the lower edge."""
    names = [f"{curve['direction']}\n{curve['pixels']} px" for curve in curves]
    floor = 1e-8
    for number, side in enumerate(("ours", "diffusers")):
        worst = [max((point["rms"] for point in _points(curve, side, whole=False)), default=None) for curve in curves]
        places = [place + 0.4 * (number - 0.5) for place, value in enumerate(worst) if value is not None]
        values = [value for value in worst if value is not None]
        if not values:
            continue
        bars = axes.bar(places, [max(value, floor) for value in values], 0.36, color=COLOURS[number], label=side)
        axes.bar_label(bars, [f"{value:.0e}" if value else "0" for value in values], color=INK, fontsize=8)
    axes.axhline(1e-6, color=INK, linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, 10)
    axes.set_xticks(range(len(curves)), names)
    axes.set_xlim(-0.6, len(curves) - 0.4)
    _finish(axes, title)
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
