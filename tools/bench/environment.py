"""Says on what a measurement was made: machine, versions, date, commit. Peak speeds are in `roofline.py`."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy")
ZEN = {26: "zen5", 25: "zen3", 23: "zen2"}  # AMD's family numbers; family 25 is Zen 4 from model 16 on, mostly
ZEN4_MODELS = (*range(0x10, 0x20), *range(0x60, 0xB0))


def collect(device: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a run.

    Args:
        device: "cpu" or "cuda".
        arguments: of the command line.
    """
    cpu = cpu_info()
    cores = usable_cores()
    found: dict[str, Any] = {
        "device": device,
        "name": cpu["name"],
        "slug": slug(cpu, cores),
        "cpu": cpu["name"],
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "locked": locked_versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "tools.bench", *arguments]),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "slug": as_slug(properties.name),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "cuda": torch.version.cuda,
        }
    return found


def load() -> float:
    """How many processes wanted a core during the last minute: more than this run explains means a busy machine."""
    return round(os.getloadavg()[0], 2)


def version(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def locked_versions() -> dict[str, str]:
    """What requirements.lock says of the same packages."""
    file = ROOT / "requirements.lock"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.findall(r"^([\w-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {name: number for name, number in found if name in PACKAGES}


def commit() -> str:
    """The checked-out commit, with "+" where tracked files differ from it; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_info() -> dict[str, Any]:
    """The CPU's name, vendor, family and model."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(errors="replace") if file.is_file() else ""
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "vendor": fields.get("vendor_id", ""),
        "family": int(fields.get("cpu family", 0)),
        "model": int(fields.get("model", 0)),
    }


def slug(cpu: dict[str, Any], cores: int) -> str:
    """A name for files: "amd-zen5-2-cores", "intel-xeon-platinum-8480-plus-56-cores"."""
    kind = ZEN.get(cpu["family"]) if cpu["vendor"] == "AuthenticAMD" else None
    if kind == "zen3" and cpu["model"] in ZEN4_MODELS:
        kind = "zen4"
    return f"{f'amd-{kind}' if kind else as_slug(cpu['name'])}-{cores}-core{'s' if cores != 1 else ''}"


def as_slug(name: str) -> str:
    """Lower-case words with hyphens; trademarks, clock rates and the word CPU left out."""
    name = re.sub(r"\((r|tm|c)\)|@.*|\bcpu\b|\bprocessor\b|\d+-core\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", " plus ")).strip("-") or "unknown"
