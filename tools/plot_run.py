"""Draws the curves of training runs from their train_log.jsonl: loss, learning rate, gradient norm, images a second.

    python tools/plot_run.py output/run                          # output/run/train_log.png
    python tools/plot_run.py output/a output/b --out compare.png # overlaid, one colour a run

Thin lines are the readings, thick ones their running mean; a cross at the foot marks a step skipped because its
loss or gradient was not finite. Needs matplotlib: pip install "sana-python[plot]".
Exit code 2: wrong arguments; 1: a log is missing or empty, matplotlib is missing, or the picture cannot be written.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.training.train_log import LOG_NAME, read_train_log

PANELS = (  # key of the record, title
    ("loss", "loss"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("images_per_second", "images per second"),
)
COLOURS = ("#1f5fa8", "#d1601f", "#2b8a4b", "#8b4fa3", "#b3922a", "#4a9db0", "#b3416b", "#6b6b6b")
INK, GRID = "#333333", "#dddddd"
LOG_RANGE = 50.0  # a panel whose values span more than this factor gets a logarithmic axis


class PlotError(RuntimeError):
    """A run that cannot be drawn; one sentence for the user."""


@dataclass(frozen=True)
class Run:
    """One log.

    Attributes:
        name: for the legend.
        curves: key -> (steps, values); values are finite.
        skipped: steps whose loss or gradient was not finite.
    """

    name: str
    curves: dict[str, tuple[list[int], list[float]]]
    skipped: list[int]


def read_run(path: Path, name: str) -> Run:
    """Reads a work_dir or a log file.

    Raises:
        PlotError: there is no log, or nothing in it to draw.
    """
    file = path / LOG_NAME if path.is_dir() else path
    try:
        records = read_train_log(file)
    except OSError as error:
        raise PlotError(
            f"{file} cannot be read ({error.strerror}): give a work_dir of train.py, or its log."
        ) from error
    curves = {}
    for key, _ in PANELS:
        points = [(one["step"], float(one[key])) for one in records if _is_number(one.get(key))]
        curves[key] = ([step for step, _ in points], [value for _, value in points])
    if not any(steps for steps, _ in curves.values()):
        raise PlotError(f"{file} holds no record with a number to draw yet.")
    return Run(name, curves, skipped_steps(records))


def skipped_steps(records: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the steps of records that tell of a skipped step.

    `skipped` is true in the record of such a step, or a count of all of them so far: then a rise is what tells.
    """
    steps, before = [], 0
    for record in records:
        skipped = record.get("skipped")
        count = skipped if isinstance(skipped, int) and not isinstance(skipped, bool) else before
        if skipped is True or count > before or ("loss" in record and record["loss"] is None):
            steps.append(record["step"])
        before = count
    return steps


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Returns the running mean around every value, which does not lag; at both ends half of the window is left.

    Args:
        values: readings.
        span: about so many of them count.
    """
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        low, high = max(0, index - span // 2), min(len(values), index + span // 2 + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return means


def draw(runs: Sequence[Run], out: Path, *, span: int | None = None, log_loss: bool = False) -> None:
    """Writes the picture, which appears whole or not at all.

    Args:
        runs: one colour each.
        out: a .png file (or .svg, .pdf).
        span: see `smooth`; None for a twentieth of the readings.
        log_loss: a logarithmic axis for the loss.

    Raises:
        PlotError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: matplotlib does not know the format that the file's name asks for.
    """
    try:
        from matplotlib.figure import Figure  # the figure alone: no window system, no global state
    except ImportError as error:
        raise PlotError('matplotlib is not installed: pip install "sana-python[plot]".') from error
    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained", facecolor="white")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axes, runs, key, span, log=log_loss if key == "loss" else _wide(runs, key))
        axes.set_title(title, loc="left", color=INK, fontsize=12)
    handles, labels = _legend(runs)
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=10, labelcolor=INK)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        figure.savefig(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _panel(axes: Any, runs: Sequence[Run], key: str, span: int | None, *, log: bool) -> None:
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        steps, values = run.curves[key]
        dots = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}  # a line needs two points
        if key == "lr":
            axes.plot(steps, values, color=colour, linewidth=1.8, **dots)
            continue
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth(values, span or max(1, len(values) // 20)), color=colour, linewidth=1.8, **dots)
        if key in ("loss", "grad_norm") and run.skipped:
            foot = axes.get_xaxis_transform()  # x in steps, y as a part of the panel's height
            axes.plot(
                run.skipped, [0.02] * len(run.skipped), "x", color=colour, markersize=7, markeredgewidth=1.6,
                transform=foot, clip_on=False,
            )  # fmt: skip
    if not any(run.curves[key][0] for run in runs):
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color=INK)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_ticks())
        axes.yaxis.set_minor_formatter(_plain_ticks())
    elif key in ("grad_norm", "images_per_second"):
        axes.set_ylim(bottom=0)
    if key == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_xlabel("step", color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_ticks() -> Any:
    """Returns what labels the same ticks of a logarithmic axis as usual, with 0.6 instead of 6 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class PlainLogFormatter(LogFormatter):
        def __call__(self, x: float, pos: Any = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return PlainLogFormatter()


def _legend(runs: Sequence[Run]) -> tuple[list[Any], list[str]]:
    """Returns one entry a run, and one for the crosses where there are any."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2.5) for colour in _colours(len(runs))]
    labels = [run.name for run in runs]
    if skipped := sum(len(run.skipped) for run in runs):
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="", markeredgewidth=1.6))
        labels.append(f"skipped, not finite ({skipped})")
    return handles, labels


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _wide(runs: Sequence[Run], key: str) -> bool:
    values = [value for run in runs for value in run.curves[key][1]]
    return key == "grad_norm" and bool(values) and min(values) > 0 and max(values) > LOG_RANGE * min(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell them all apart."""
    parts = [(path.parent if path.name == LOG_NAME else path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="WORK_DIR", help="folders of runs, or their log files")
    parser.add_argument("--out", type=Path, help="picture to write; default train_log.png beside the (first) log")
    parser.add_argument("--smooth", type=int, metavar="N", help="readings in the running mean; default a twentieth")
    parser.add_argument("--log_loss", action="store_true", help="logarithmic axis for the loss")
    options = parser.parse_args(arguments)
    if options.smooth is not None and options.smooth < 1:
        parser.error(f"--smooth must be at least 1, not {options.smooth}")
    first = options.runs[0]
    out = options.out or (first if first.is_dir() else first.parent) / "train_log.png"
    try:
        runs = [read_run(path, name) for path, name in zip(options.runs, run_names(options.runs), strict=True)]
        draw(runs, out, span=options.smooth, log_loss=options.log_loss)
    except (PlotError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for run in runs:
        steps, losses = run.curves["loss"]
        last = f"loss {losses[-1]:.4f} at step {steps[-1]}" if steps else "no loss"
        print(f"{run.name}: {last}, {len(run.skipped)} skipped")
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
