"""The targets of the project: which measurement answers each, and whether it is reached. None is ever softened."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.bench.results import CaseResult, Report

REACHED, MISSED, UNMEASURED = "reached", "not reached", "not measured"
COMPILED = "diffusers + torch.compile"
ROOFLINE = "roofline"
SMALL = "1024 px"  # the side of a scaling case that the largest image's time a token is compared with


@dataclass(frozen=True)
class Target:
    """One row.

    Attributes:
        device: "cpu" or "cuda".
        work: what is done.
        against: what it is compared with.
        key: of the cases that answer it.
        side: the other side's name; `ROOFLINE` for the share of the bandwidth limit, `SMALL` for an image's time a
            token.
        ratio: at least; `math.nan` where only `seconds` counts.
        seconds: at most, on the GPU named in `on`.
        on: part of a GPU's name that `seconds` holds for.
    """

    device: str
    work: str
    against: str
    key: str
    side: str
    ratio: float
    seconds: float = math.inf
    on: str = ""

    @property
    def goal(self) -> str:
        """The target in words."""
        if self.side == ROOFLINE:
            return f">= {self.ratio:.0%}"
        if self.side == SMALL:
            return f"at most {1 / self.ratio - 1:.0%} more"
        if math.isfinite(self.seconds):
            return f"<= {self.seconds:g} s"
        return f"{self.ratio:g}x"

    def words(self, value: float) -> str:
        """A measured value as `goal` has it."""
        if self.side == ROOFLINE:
            return f"{value:.0%}"
        if self.side == SMALL:
            return f"{1 / value - 1:+.1%}"
        return f"{value:.3g} s" if self.side == "" else f"{value:.2f}x"


@dataclass(frozen=True)
class Answer:
    """A target with what was measured: `ratio` (or seconds) on the clock and by process time, and the verdict."""

    target: Target
    status: str
    value: float = math.nan
    cpu_value: float = math.nan
    detail: str = ""


def _block_stack() -> list[Target]:
    goals = {("fp32", 512): 2.5, ("fp32", 1024): 1.8, ("bf16", 512): 1.6, ("bf16", 1024): 1.8}
    return [
        Target("cpu", f"CPU DiT block stack, {dtype}, {pixels} px", "diffusers", f"block_stack.{dtype}.{pixels}",
               "diffusers", ratio)
        for (dtype, pixels), ratio in goals.items()
    ]  # fmt: skip


def _gpu_model(model: str, eager: float, compiled: float, seconds: float) -> list[Target]:
    work, key = f"GPU {model} 1024 px, 20 steps with CFG, batch 1, end to end", f"end_to_end.{model}"
    return [
        Target("cuda", work, "diffusers eager", key, "diffusers", eager),
        Target("cuda", work, COMPILED, key, COMPILED, compiled),
        Target("cuda", work, "time on an H200", key, "", math.nan, seconds, "H200"),
    ]


def _scaling(device: str, dtype: str) -> Target:
    work = f"{'CPU' if device == 'cpu' else 'GPU'} DiT at 0.6B widths, {dtype}: time a latent token at 4096 px"
    return Target(device, work, "1024 px", f"scaling.linear.{dtype}", SMALL, 1 / 1.15)


TARGETS = (
    *_block_stack(),
    Target("cpu", "CPU end to end with the bundled model, 20 steps", "the same model in diffusers",
           "end_to_end.bundled", "diffusers", 1.5),
    _scaling("cpu", "fp32"),
    _scaling("cpu", "bf16"),
    *_gpu_model("0.6B", 2.5, 1.3, 0.15),
    *_gpu_model("1.6B", 2.0, 1.3, 0.28),
    Target("cuda", "GPU throughput, best batch, 1024 px", "diffusers", "throughput.0.6B", "diffusers", 1.7),
    Target("cuda", "Triton linear attention forward", "bandwidth limit", "linear_attention.forward", ROOFLINE, 0.7),
    Target("cuda", "Triton linear attention backward", "bandwidth limit", "linear_attention.backward", ROOFLINE, 0.7),
    _scaling("cuda", "bf16"),
    Target("cuda", "training step 0.6B 512 px bf16, precomputed features", "diffusers model in the same loop",
           "training_step.0.6B", "diffusers", 1.4),
)  # fmt: skip


def answers(report: Report) -> list[Answer]:
    """Every target with its measurement in a report; those of the other device are not measured."""
    return [_answer(target, report) for target in TARGETS]


def _answer(target: Target, report: Report) -> Answer:
    if target.device != report.environment["device"]:
        return Answer(target, UNMEASURED)
    cases = report.find(target.key)
    if target.side not in ("", ROOFLINE):
        cases = [case for case in cases if target.side in case.timings]
    if not cases:
        return Answer(target, UNMEASURED, detail=_why_not(target, report))
    if target.key.startswith("throughput."):
        return _throughput(target, cases)
    if target.side == ROOFLINE:
        shares = [share for case in cases if (share := _share(case, report)) is not None]
        return _verdict(target, min(shares)) if shares else Answer(target, UNMEASURED, detail="roofline unknown")
    case = cases[0]
    if target.side == "":
        seconds = statistics.median(case.timings[case.ours].wall)
        if target.on.lower() not in report.environment["name"].lower():
            return Answer(target, UNMEASURED, seconds, detail=f"{seconds:.3g} s on another GPU")
        return Answer(target, REACHED if seconds <= target.seconds else MISSED, seconds)
    return _verdict(target, case.ratio(target.side), case.ratio(target.side, "cpu"))


def _verdict(target: Target, value: float, cpu_value: float = math.nan) -> Answer:
    return Answer(target, REACHED if value >= target.ratio else MISSED, value, cpu_value)


def _share(case: CaseResult, report: Report) -> float | None:
    """Bytes that must be moved, a second, over the bandwidth; of the Triton side."""
    name = next((name for name in case.timings if "Triton" in name), None)
    bandwidth = report.roofline.get("bandwidth")
    if name is None or not bandwidth:
        return None
    return case.bytes / statistics.median(case.timings[name].wall) / bandwidth


def _throughput(target: Target, cases: Sequence[CaseResult]) -> Answer:
    """Our best batch against the other side's best batch."""

    def best(name: Callable[[CaseResult], str]) -> float:
        return max(case.images / statistics.median(case.timings[name(case)].wall) for case in cases)

    ours, theirs = best(lambda case: case.ours), best(lambda case: target.side)
    answer = _verdict(target, ours / theirs)
    return Answer(target, answer.status, answer.value, detail=f"{ours:.3g} and {theirs:.3g} images/s")


def _why_not(target: Target, report: Report) -> str:
    tried = [case for case in report.cases if case.key == target.key]
    return next((case.reason for case in tried if case.reason), "") if tried else ""
