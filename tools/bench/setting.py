"""What every part is told: which suite, which device. The suites themselves are in `suites.py`."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from sana.pipelines.loading import as_device


@dataclass(frozen=True)
class Setting:
    """One run of one suite.

    Attributes:
        suite: "cpu", "gpu" or "quick" (reduced sizes, to see that everything works).
        device: "cpu" or "cuda".
        folder: for temporary files of the run.
    """

    suite: str
    device: str
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))

    def __post_init__(self) -> None:
        as_device(self.device)
