"""What was measured, as data: statistics, ratios, and JSON both ways. Nothing is measured or drawn here."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
STATUSES = ("measured", "failed", "skipped")
OURS = "ours"


@dataclass(frozen=True)
class Check:
    """How far two results are apart: RMS of the difference over RMS of the other side's, and what is allowed."""

    rms_ratio: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the results are alike; NaN never is."""
        return self.rms_ratio <= self.tolerance


@dataclass(frozen=True)
class Timing:
    """Seconds of one side, one value a round.

    Attributes:
        wall: on the clock that `clock` names.
        cpu: of all cores together.
        gpu: between CUDA events; empty on a CPU.
        peak_bytes: greatest memory, of the process or of the GPU, while this side ran.
        clock: "wall" or "CUDA events".
    """

    wall: list[float]
    cpu: list[float]
    gpu: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    clock: str = "wall"


@dataclass(frozen=True)
class CaseResult:
    """One line of the tables; see `tools.bench.harness.Case`. `timings` is empty unless `status` is "measured"."""

    part: str
    name: str
    key: str
    status: str
    reason: str = ""
    checks: dict[str, Check] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    images: float = 0.0

    @property
    def ours(self) -> str:
        """Name of the side that the others are compared with."""
        return next(iter(self.timings))

    @property
    def others(self) -> list[str]:
        """Names of the other sides."""
        return list(self.timings)[1:]

    def ratio(self, other: str, clock: str = "wall") -> float:
        """Median over the rounds of other / ours: above 1 we are faster."""
        return statistics.median(self.ratios(other, clock))

    def ratios(self, other: str, clock: str = "wall") -> list[float]:
        """other / ours of every round. Process time of work too short to see counts as equal."""
        pairs = zip(getattr(self.timings[other], clock), getattr(self.timings[self.ours], clock), strict=True)
        return [theirs / mine if mine > 0 else 1.0 for theirs, mine in pairs]

    def to_dict(self) -> dict[str, Any]:
        """All of it, and medians, quartiles and ratios for the reader, which `from_dict` makes anew."""
        content = asdict(self)
        for name, check in self.checks.items():  # JSON has no NaN
            content["checks"][name]["rms_ratio"] = check.rms_ratio if math.isfinite(check.rms_ratio) else None
        for name, timing in self.timings.items():
            content["timings"][name] |= {
                "median": statistics.median(timing.wall), "quartiles": quartiles(timing.wall),
                "cpu_median": statistics.median(timing.cpu),
            }  # fmt: skip
        content["ratios"] = {
            other: {
                "wall": self.ratios(other), "wall_median": self.ratio(other),
                "cpu": self.ratios(other, "cpu"), "cpu_median": self.ratio(other, "cpu"),
            }
            for other in self.others
        }  # fmt: skip
        return content

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "CaseResult":
        """The inverse of `to_dict`."""
        own = {name: content[name] for name in CaseResult.__dataclass_fields__}
        own["checks"] = {
            name: Check(
                math.nan if check["rms_ratio"] is None else check["rms_ratio"], check["tolerance"], check["note"]
            )
            for name, check in own["checks"].items()
        }
        own["timings"] = {
            name: Timing(**{key: timing[key] for key in Timing.__dataclass_fields__})
            for name, timing in own["timings"].items()
        }
        return CaseResult(**own)


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        suite: "cpu", "gpu" or "quick".
        environment: of `tools.bench.environment`.
        roofline: of `tools.bench.roofline`.
        cases: in the order in which they ran.
        seconds: that the whole run took.
    """

    suite: str
    environment: dict[str, Any]
    roofline: dict[str, Any]
    cases: list[CaseResult]
    seconds: float = 0.0

    def find(self, key: str) -> list[CaseResult]:
        """The cases of a key that were measured."""
        return [case for case in self.cases if case.key == key and case.status == "measured"]

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "environment": self.environment,
            "roofline": self.roofline,
            "seconds": self.seconds,
            "cases": [case.to_dict() for case in self.cases],
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict`.

        Raises:
            ValueError: the file is of another version.
        """
        if content.get("schema") != SCHEMA:
            raise ValueError(f"schema {content.get('schema')!r} is not known; this version reads {SCHEMA}.")
        cases = [CaseResult.from_dict(case) for case in content["cases"]]
        return Report(
            content["suite"], dict(content["environment"]), dict(content["roofline"]), cases, content["seconds"]
        )


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower and upper quartile; of a single value, that value twice."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
