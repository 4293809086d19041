"""What a training left in its folder, and how two of them are compared. No process is started here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMINGS = {"seconds", "images_per_second"}


def logged(work_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's log without timings, also of a running one."""
    path = work_dir / "train_log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def last_step(work_dir: Path) -> int:
    return max((record["step"] for record in logged(work_dir)), default=0)


def state(work_dir: Path) -> dict[str, Any]:
    """Everything that a run left behind: exported weights, every file of the last checkpoint, the log."""
    checkpoint = work_dir / "checkpoints" / (work_dir / "checkpoints/latest").read_text().strip()
    files = {path.name: path for path in checkpoint.iterdir() if path.suffix in (".pt", ".safetensors")}
    load = {".pt": lambda path: torch.load(path, weights_only=True), ".safetensors": load_file}
    return {
        "model": load_file(work_dir / "model/model.safetensors"),
        "log": logged(work_dir),
        "index": json.loads((checkpoint / "checkpoint.json").read_text())["step"],
        **{name: load[path.suffix](path) for name, path in files.items()},
    }


def assert_same(first: Any, second: Any, where: str = "", *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Demands equality, bitwise unless there is a tolerance, of nested containers; timings are left out."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first.keys() - TIMINGS:
            assert_same(first[key], second[key], f"{where}/{key}", rtol=rtol, atol=atol)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}/{number}", rtol=rtol, atol=atol)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{where}: {m}")
    else:
        assert first == second, where
