"""Greatest memory, each side alone: on a CPU from a process's start to its first picture, on a GPU of one batch."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench.clocks import Sample
from tools.bench.end_to_end import REDUCED, reduced_shape
from tools.bench.harness import Case, Check, Comparison, Side, Work, compare
from tools.bench.networks import DTYPES, require_diffusers
from tools.bench.pairs import BUNDLED, GUIDANCE, ROOT, Shape, bundled_ours, export_bundled, random_ours, random_theirs
from tools.bench.results import OURS
from tools.bench.setting import Setting

CHECKED = "a red cat to the left of a blue star on a white background"
TOLERANCE = 1e-3


def cases(setting: Setting) -> list[Case]:
    """A process of its own on a CPU; batch 1 of both models on a GPU."""
    if setting.device == "cpu":
        steps = 2 if setting.suite == "quick" else 20
        name = f"bundled model, process start to first picture, {steps} steps, fp32"
        return [Case("memory", name, partial(process_comparison, setting, steps), 15.0, 150.0, 1 if steps == 2 else 3)]
    if setting.suite == "quick":
        build = partial(gpu_comparison, "0.6B", setting, reduced_shape(), 2)
        return [Case("memory", f"{REDUCED}, each side alone", build, 5.0, rounds=1)]
    title = "bf16, 1024 px, 20 steps, batch 1, each side alone"
    return [
        Case("memory", f"{model}, {title}", partial(gpu_comparison, model, setting), 20.0, 90.0, 1)
        for model in ("0.6B", "1.6B")
    ]


class Process:
    """Runs `probe.py`; the time of processes is measured from outside.

    Args:
        side: "ours" or "diffusers".
        folder: with settings.json.
    """

    def __init__(self, side: str, folder: Path) -> None:
        self.side, self.folder = side, folder
        self.peak = 0

    def __call__(self) -> Tensor:
        """The picture."""
        command = [sys.executable, "-m", "tools.bench.probe", self.side, str(self.folder)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
        self.peak = int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
        return torch.load(self.folder / f"{self.side}.pt", weights_only=True)


def process_stopwatch(run: Callable[[], Any], repeats: int = 1) -> Sample:
    """Time of child processes: on the clock, and of all their threads together."""
    wall, before = time.perf_counter(), os.times()
    for _ in range(repeats):
        run()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Sample((time.perf_counter() - wall) / repeats, cpu / repeats)


def process_comparison(setting: Setting, steps: int) -> Comparison:
    """Both sides in fresh processes."""
    require_diffusers()
    folder = setting.folder
    ours = bundled_ours()
    text = ours.pipeline.config.text_encoder
    settings = {
        "ours": str(BUNDLED), "diffusers": str(export_bundled(folder)), "prompt": CHECKED, "pixels": ours.pixels,
        "steps": steps, "guidance": GUIDANCE, "noise_shape": list(ours.noise(1, 0).shape),
        "chi_prompt": list(text.chi_prompt or []), "max_length": text.model_max_length,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    processes = [Process(OURS, folder), Process("diffusers", folder)]

    def check() -> dict[str, Check]:
        mine, other = (process() for process in processes)
        return {"diffusers": compare(mine, other, tolerance=TOLERANCE)}

    sides = [Side(process.side, process, peak=partial(getattr, process, "peak")) for process in processes]
    return Comparison(sides, check, work=Work(images=1), stopwatch=process_stopwatch, warm_up=False)


class Alone:
    """A pipeline that exists only while it runs: builds itself, makes one picture to warm up and one that is measured.

    Args:
        build: makes the pipeline.
        device: "cuda", or "cpu" in tests.
    """

    def __init__(self, build: Callable[[], Callable[[], Tensor]], device: str) -> None:
        self._build, self._cuda = build, device != "cpu"
        self.peak = 0

    def __call__(self) -> Tensor:
        """The second picture."""
        self._clean()
        before = torch.cuda.memory_allocated() if self._cuda else 0
        make = self._build()
        make()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        picture = make().cpu()
        self.peak = torch.cuda.max_memory_allocated() - before if self._cuda else 0
        del make
        self._clean()
        return picture

    def _clean(self) -> None:
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()


def gpu_comparison(model: str, setting: Setting, shape: Shape | None = None, steps: int = 20) -> Comparison:
    """Our compiled pipeline and diffusers', one after the other; the times include building them and mean nothing."""
    require_diffusers()
    shape, device = shape or Shape(model), setting.device

    def ours() -> Callable[[], Tensor]:
        side = random_ours(shape, device, DTYPES["bf16"], steps)
        if device != "cpu":
            side.pipeline.compile(mode="max")
        return partial(side.make, [CHECKED])

    def theirs() -> Callable[[], Tensor]:
        side = random_theirs(random_ours(shape, device, DTYPES["bf16"], steps))  # whose networks are freed here
        return partial(side.make, [CHECKED])

    alone = {OURS: Alone(ours, device), "diffusers": Alone(theirs, device)}
    sides = [Side(name, one, peak=partial(getattr, one, "peak")) for name, one in alone.items()]
    facts = {"memory_only": "the pictures are compared in the part end_to_end, and the times include building"}
    return Comparison(sides, dict, device, work=Work(images=1), facts=facts, warm_up=False)
