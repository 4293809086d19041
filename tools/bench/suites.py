"""Which parts a suite has, in which order they run, and the run itself. What a part measures is in its file."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from sana.registry import Registry
from tools.bench import environment, roofline
from tools.bench.harness import Case, Deadline, run_case
from tools.bench.results import CaseResult, Report
from tools.bench.setting import Setting

PARTS = Registry(
    "part",
    {
        "end_to_end": "tools.bench.end_to_end:cases",
        "block_stack": "tools.bench.block_stack:cases",
        "training_step": "tools.bench.training_step:cases",
        "scaling": "tools.bench.scaling:cases",
        "loader": "tools.bench.loader:cases",
        "operators": "tools.bench.operators:cases",
        "memory": "tools.bench.memory:cases",
        "dit": "tools.bench.dit:cases",
        "tiling": "tools.bench.tiling:cases",
    },
)
SECONDS = {"cpu": 570.0, "gpu": 500.0, "quick": 150.0}
ROUNDS = {"cpu": 7, "gpu": 10, "quick": 2}
# What the targets ask for runs first, so that a deadline costs the rest. In this order no pipeline is built twice.
FIRST = ("end_to_end.0.6B", "linear_attention.", "training_step.", "throughput.", "end_to_end.1.6B")


@dataclass(frozen=True)
class Options:
    """How a suite is run.

    Attributes:
        only: names of parts; empty for all.
        rounds: None for the suite's number.
        seconds: budget; None for the suite's.
        strict: stop at the first error with its traceback.
        arguments: of the command line, for the record.
    """

    only: Sequence[str] = ()
    rounds: int | None = None
    seconds: float | None = None
    strict: bool = False
    arguments: Sequence[str] = ()


def plan(setting: Setting, only: Sequence[str] = ()) -> list[Case]:
    """All cases of a suite in the order in which they run."""
    cases = [case for name in PARTS if not only or name in only for case in PARTS[name](setting)]
    return sorted(cases, key=_rank)  # stable: cases of a part stay in their order


def run_suite(setting: Setting, options: Options, on_case: Callable[[Report], None]) -> Report:
    """Measures every case that fits into the time; the others are named as skipped.

    Args:
        setting: suite and device.
        options: see there.
        on_case: called with the report so far, that a crash may not cost it.
    """
    started = time.monotonic()
    deadline = Deadline(options.seconds if options.seconds is not None else SECONDS[setting.suite])
    about = environment.collect(setting.device, options.arguments)
    limits = roofline.of_device(setting.device, about["name"], small=setting.suite == "quick")
    cases = plan(setting, options.only)
    results: list[CaseResult] = []
    report = Report(setting.suite, about, limits, results)
    with tqdm(total=len(cases), unit="case", dynamic_ncols=True) as bar:
        for case in cases:
            bar.set_description(f"{case.part}: {case.name}"[:70])
            rounds = options.rounds if options.rounds is not None else ROUNDS[setting.suite]
            results.append(run_case(case, rounds, deadline, strict=options.strict))
            clean(setting.device)
            on_case(report)
            bar.update()
    about["load_after"] = environment.load()
    return Report(setting.suite, about, limits, results, time.monotonic() - started)


def clean(device: str) -> None:
    """Frees what a case has left."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _rank(case: Case) -> int:
    return next((place for place, prefix in enumerate(FIRST) if case.key.startswith(prefix)), len(FIRST))
