"""Measures on this machine what is fast and what is not, against diffusers with the same weights, in turn.

    python -m tools.bench                              # everything for this machine: the GPU suite where there is one
    python -m tools.bench --suite quick                # reduced sizes, to see that everything works
    python -m tools.bench --only operators --rounds 20

A whole suite writes asset/docs/benchmarks/DEVICE.{json,md,png}; other runs write into output/benchmarks. Progress is
shown on stderr, and the table comes last on stdout. What does not fit into --seconds is skipped by name.
Exit codes: 0 done, 1 a comparison failed (results that differ, or an error), 2 wrong arguments.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sana.registry import suggest

ROOT = Path(__file__).parents[2]
SUITES = ("cpu", "gpu", "quick", "all")
PARTS = ("end_to_end", "block_stack", "training_step", "scaling", "loader", "operators", "memory", "dit", "tiling")


def one_of(kind: str, known: Sequence[str], name: str) -> str:
    """Returns a known name; argparse ends with exit code 2 on the error of another one."""
    if name in known:
        return name
    raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}.{suggest(name, list(known))} Known: {', '.join(known)}")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--suite", type=partial(one_of, "suite", SUITES), metavar="|".join(SUITES), help="[by the machine]")
    add("--only", type=partial(one_of, "part", PARTS), action="append", default=[], metavar="PART",
        help=f"only this part; may be repeated: {', '.join(PARTS)}")  # fmt: skip
    add("--rounds", type=int, help="of every comparison, at most [7 on a CPU, 10 on a GPU]")
    add("--output", type=Path, metavar="DIR", help="where to write [asset/docs/benchmarks, or output/benchmarks]")
    add("--seconds", type=float, help="time for each suite [cpu 570, gpu 500, quick 150]")
    add("--list", action="store_true", help="only say what would be measured")
    add("--raise", dest="strict", action="store_true", help="stop at the first error, with its traceback")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suites; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be positive, not {options.seconds:g}")
    import torch  # takes seconds: a typo is told before

    gpu = torch.cuda.is_available()
    if options.suite == "gpu" and not gpu:
        parser.error("--suite gpu needs a CUDA GPU, and this machine has none")
    suites = {None: ["gpu" if gpu else "cpu"], "all": ["gpu", "cpu"] if gpu else ["cpu"]}
    failed = [_run(suite, options, arguments, gpu) for suite in suites.get(options.suite, [options.suite])]
    return int(any(failed))


def _run(suite: str, options: argparse.Namespace, arguments: Sequence[str], gpu: bool) -> bool:
    """Runs one suite and writes it; returns whether a comparison failed."""
    from sana.utils.logging import setup_logging
    from tools.bench import plots, report
    from tools.bench.results import Report
    from tools.bench.setting import Setting
    from tools.bench.suites import Options, plan, run_suite

    setup_logging("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of diffusers, about names that its older releases need
    device = "cuda" if suite == "gpu" or (suite == "quick" and gpu) else "cpu"
    with tempfile.TemporaryDirectory(prefix="sana-bench-") as folder:
        setting = Setting(suite, device, Path(folder))
        if options.list:
            print("\n".join(f"{case.part}: {case.name}" for case in plan(setting, options.only)))
            return False
        whole = suite != "quick" and not options.only
        target = options.output or ROOT / ("asset/docs/benchmarks" if whole else "output/benchmarks")

        def stem(done: Report) -> str:
            names = [done.environment["slug"], *(["quick"] if suite == "quick" else []), *options.only]
            return "-".join(names)

        def keep(done: Report) -> None:
            report.write(done, target, stem(done))

        how = Options(options.only, options.rounds, options.seconds, options.strict, arguments)
        done = run_suite(setting, how, keep)
    paths = report.write(done, target, stem(done))
    try:
        plots.draw(done, target / f"{stem(done)}.png")
        paths.append(target / f"{stem(done)}.png")
    except plots.PlotError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    print(report.summary(done))
    return any(case.status == "failed" for case in done.cases)


if __name__ == "__main__":
    sys.exit(main())
