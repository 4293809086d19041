"""What a plan says and how it is shown: a table that a person reads, plain values for JSON. Nothing is decided here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sana.pipelines.plan_stages import Stage

GB, MB = 10**9, 10**6
CUDA_NOTE = (
    "allocated tensors only: the CUDA context, loaded kernels and the allocator's spare blocks come on top (nvidia-smi "
    "shows them, torch.cuda.max_memory_allocated does not); keep some memory free with margin."
)
CPU_NOTE = "allocated tensors only: the interpreter, its libraries and freed memory that malloc keeps come on top."


@dataclass(frozen=True)
class Reason:
    """A setting of a plan: its name as an option, its value, and in words why it is so."""

    setting: str
    value: str
    why: str


@dataclass(frozen=True)
class Sheet:
    """What every plan holds.

    Attributes:
        headline: what is planned, in one line.
        stages: in their order; see `Stage`.
        limit: bytes that may be allocated, the margin taken off; None: no bound.
        host: bytes of weights that offload keeps in the machine's memory.
        reasons: the settings, and why.
        notes: what the numbers do not hold.
    """

    headline: str
    stages: tuple[Stage, ...]
    limit: int | None
    host: int
    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]

    @property
    def decisive(self) -> Stage:
        """The stage that needs most; of equal ones the first."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        """Bytes that are allocated on the device at most."""
        return self.decisive.total

    def __str__(self) -> str:
        return render(self)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, amounts in bytes."""
        stages = [
            {"name": one.name, "held": dict(one.held), "resident": one.resident, "peak": one.peak, "total": one.total}
            for one in self.stages
        ]
        return {
            "headline": self.headline,
            "fits": True,
            "needed": self.peak,
            "allowed": self.limit,
            "decisive": self.decisive.name,
            "host": self.host,
            "stages": stages,
            "settings": [asdict(reason) for reason in self.reasons],
            "notes": list(self.notes),
        }


def render(sheet: Sheet) -> str:
    """Returns a plan as text: a table of what every stage holds, the sums, the settings with their reasons, notes."""
    unit, name, digits = (GB, "GB", 2) if sheet.peak >= GB else (MB, "MB", 1)

    def show(amount: int) -> str:
        return f"{amount / unit:,.{digits}f}"

    lines = [f"needed   {show(sheet.peak)} {name}, in {sheet.decisive.name}"]
    if sheet.limit is not None:
        lines.append(f"allowed  {show(sheet.limit)} {name}; {show(sheet.limit - sheet.peak)} {name} stay free")
    if sheet.host:
        lines.append(f"host     {show(sheet.host)} {name} of weights wait in the machine's memory")
    settings = [("setting", "value", "why"), *((one.setting, one.value, one.why) for one in sheet.reasons)]
    blocks = [
        [sheet.headline],
        columns(_stage_table(sheet, name, show), right=True),
        lines,
        columns(settings),
        [f"note: {note}" for note in sheet.notes],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _stage_table(sheet: Sheet, unit: str, show: Any) -> list[tuple[str, ...]]:
    """Returns the cells: a column for every stage, a row for everything held, and the sums."""
    held = list(dict.fromkeys(name for stage in sheet.stages for name in stage.held))
    rows: list[tuple[str, ...]] = [(unit, *(stage.name for stage in sheet.stages))]
    for name in held:
        amounts = (stage.held.get(name, 0) for stage in sheet.stages)
        rows.append((name.replace("_", " "), *(show(amount) if amount else "-" for amount in amounts)))
    rows.append(("above these", *(show(stage.peak) for stage in sheet.stages)))
    rows.append(("total", *(show(stage.total) for stage in sheet.stages)))
    rows.append(("", *("decides" if stage is sheet.decisive else "" for stage in sheet.stages)))
    return rows


def columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Returns aligned lines.

    Args:
        rows: of cells, equally many.
        right: all columns but the first end at the same place.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("   ".join(cells).rstrip())
    return lines
