"""Reading the recorded cases: where they are, what a case holds, how a result is compared. No case is run here."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.tolerance import assert_all_close

DEFAULT_FOLDER = Path(__file__).parent / "data"


def parity_folder() -> Path:
    """Returns the folder named by SANA_PARITY_DIR, else the one beside this file."""
    return Path(os.environ.get("SANA_PARITY_DIR") or DEFAULT_FOLDER)


@dataclass(frozen=True)
class Case:
    """One entry of cases.json.

    Attributes:
        raw: the entry as it stands in the file.
        folder: where the entry's files are.
    """

    raw: dict[str, Any]
    folder: Path
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.raw["name"]

    @property
    def kind(self) -> str:
        return self.raw["kind"]

    @property
    def constructor(self) -> dict[str, Any]:
        return self.raw.get("constructor") or {}

    @property
    def call(self) -> dict[str, Any]:
        return self.raw.get("call") or {}

    @property
    def tolerance(self) -> dict[str, float]:
        return self.raw["tolerance"]

    @property
    def informative_only(self) -> bool:
        return bool(self.raw.get("informative_only"))

    def path(self, relative: str) -> Path:
        """Returns a file or folder beside cases.json."""
        return self.folder / relative

    def load(self, relative: str) -> Any:
        """Reads a JSON file, or a safetensors file as {name: tensor}; float16 tensors come as float32."""
        if relative not in self._cache:
            path = self.path(relative)
            if path.suffix == ".json":
                self._cache[relative] = json.loads(path.read_text(encoding="utf-8"))
            else:
                self._cache[relative] = {name: _widen(tensor) for name, tensor in load_file(path).items()}
        loaded = self._cache[relative]
        return dict(loaded) if isinstance(loaded, dict) else loaded

    def tensors(self, prefix: str = "in.") -> dict[str, torch.Tensor]:
        """Returns the case's tensors whose names start with `prefix`, named without it. float16 comes as float32."""
        if self.raw.get("file") is None:
            return {}
        stored = self.load(self.raw["file"])
        return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor of the case by its full stored name ("out", "in.x")."""
        return self.load(self.raw["file"])[name]

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the state dict: the `w.*` tensors, else those of `weights_file` or of the case `weights_from`."""
        own = self.tensors("w.")
        if own:
            return own
        source = self.raw.get("weights_file")
        if source is None and "weights_from" in self.constructor:
            source = self.other(self.constructor["weights_from"]).raw["file"]
        if source is None:
            raise KeyError(f"case {self.name} names no weights")
        stored = self.load(source)
        return {name.removeprefix("w."): v for name, v in stored.items() if name.startswith("w.")} or stored

    def other(self, name: str) -> "Case":
        """Returns another case of the same folder by its name."""
        for case in load_cases(self.folder):
            if case.name == name:
                return case
        raise KeyError(f"case {self.name} needs the case {name}, which {self.folder / 'cases.json'} does not have")

    def assert_close(self, actual: Any, expected: Any, what: str = "") -> None:
        """Asserts that every element agrees within the case's own rtol and atol, and that shapes are equal."""
        assert_all_close(
            _as_tensor(actual),
            _as_tensor(expected),
            rtol=float(self.tolerance["rtol"]),
            atol=float(self.tolerance["atol"]),
            what=f"{self.name} {what}".strip(),
        )


def load_cases(folder: Path | None = None) -> list[Case]:
    """Returns every case of a folder's cases.json.

    Raises:
        ValueError: the file has another format than 1.
    """
    folder = folder or parity_folder()
    content = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    if content.get("format") != 1:
        raise ValueError(f"{folder / 'cases.json'}: format {content.get('format')!r} is not known; only 1 is")
    return [Case(raw, folder) for raw in content["cases"]]


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.as_tensor(np.asarray(value))
