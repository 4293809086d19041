"""Peak memory and time of the DC-AE by size of the tiles, and how far tiles are from the whole run: ours, diffusers'.

    python -m tools.bench.tiling                        # the suite of this machine
    python -m tools.bench.tiling --full 1024 2048       # the full-width f32c32 at these sizes instead of the suite's
    python -m tools.bench.tiling --suite quick          # to see that it works

Writes asset/docs/benchmarks/tiling-DEVICE.{json,md,png} (quick: output/benchmarks). Peaks are bytes above the weights
and the input, of all that is allocated: counted operation by operation on a CPU, by PyTorch's allocator on a GPU. Both
sides have the same weights: the bundled autoencoder's, or random ones in the full width. The picture is in
`tiling_plots.py`. As a part of `tools.bench` (`--only tiling`) the default tiles of the bundled one are timed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sana.data.scenes import draw_scene, scenes
from sana.models.autoencoder.dc_ae import DCAE, DCAE_PRESETS
from sana.models.autoencoder.loading import load_autoencoder
from sana.models.autoencoder.tiling import Tiling
from sana.pipelines.memory.tracker import MemoryTracker
from tools.bench import environment
from tools.bench.harness import Case, Check, Comparison, Side, compare
from tools.bench.networks import diffusers_autoencoder, exact_convolutions, random_autoencoder, require_diffusers
from tools.bench.pairs import BUNDLED, ROOT
from tools.bench.setting import Setting
from tools.bench.tiling_plots import draw

BUNDLED_NAME, FULL_NAME = "bundled", "f32c32"
FULL = "dc-ae-f32c32-sana-1.0"
DECODE, ENCODE = "decode", "encode"
OURS, THEIRS = "ours", "diffusers"
TILES = (128, 256, 448, 896)  # what one tile makes, in pixels
SIZES = {  # pixels of the image along one side
    "quick": {BUNDLED_NAME: (512,), FULL_NAME: ()},
    "cpu": {BUNDLED_NAME: (1024, 2048, 4096), FULL_NAME: (512,)},
    "gpu": {BUNDLED_NAME: (1024, 2048, 4096), FULL_NAME: (1024, 2048, 4096)},
}
EXACT = {"cpu": 1e-6, "cuda": 1e-5}  # RMS ratio that our tiles may differ by from the whole run in float32


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        side: whose network.
        tile: pixels along one side that a tile makes; 0 for the whole image at once.
        seconds: of one run after a first one; of the first where a run takes long.
        peak_bytes: see the module.
        rms: RMS of the difference from that side's whole run, over the RMS of that; 0 for the whole run itself.
        most: greatest difference over the range of the whole run.
    """

    side: str
    tile: int
    seconds: float
    peak_bytes: int
    rms: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class Curve:
    """One network, one direction, one size."""

    network: str
    direction: str
    pixels: int
    dtype: str
    points: list[Point] = field(default_factory=list)

    def of(self, side: str) -> list[Point]:
        """The points of a side, the whole run last."""
        found = [point for point in self.points if point.side == side]
        return sorted(found, key=lambda point: point.tile or self.pixels)


def cases(setting: Setting) -> list[Case]:
    """The bundled autoencoder in default tiles, against its whole run and diffusers' tiles."""
    pixels = 1024 if setting.suite == "quick" else 2048
    return [
        Case(
            "tiling", f"bundled autoencoder, {direction} at {pixels} px, fp32, default tiles",
            partial(build_comparison, setting, direction, pixels), 20.0, 90.0, 3, f"tiling.{direction}",
        )
        for direction in (DECODE, ENCODE)
    ]  # fmt: skip


def build_comparison(setting: Setting, direction: str, pixels: int) -> Comparison:
    """Our tiles, our whole run, diffusers' tiles."""
    require_diffusers()
    networks = {name: network_of(BUNDLED_NAME, setting.device) for name in ("ours", "ours, whole")}
    theirs = diffusers_autoencoder(networks["ours"])
    x = input_of(networks["ours"], BUNDLED_NAME, direction, pixels)
    run = {name: our_run(network, direction, x) for name, network in networks.items()}
    networks["ours"].enable_tiling()
    networks["ours, whole"].disable_tiling()
    run["diffusers, blended"] = their_run(theirs, direction, x, networks["ours"].scaling_factor)

    def check() -> dict[str, Check]:
        theirs.disable_tiling()
        whole = run["diffusers, blended"]()
        theirs.enable_tiling()
        rms, most = errors(run["diffusers, blended"](), whole)
        facts["diffusers"] = {"rms_ratio": rms, "greatest_of_range": most}
        return {"ours, whole": compare(run["ours"](), run["ours, whole"](), tolerance=EXACT[setting.device])}

    facts: dict[str, Any] = {"dtype": "fp32", "pixels": pixels}
    return Comparison([Side(name, one) for name, one in run.items()], check, setting.device, facts=facts)


def network_of(name: str, device: str, dtype: torch.dtype = torch.float32) -> DCAE:
    """The bundled autoencoder, or one of the full width with random weights."""
    if name == FULL_NAME:
        return random_autoencoder(DCAE_PRESETS[FULL], device, dtype)
    network = load_autoencoder(BUNDLED)
    assert isinstance(network, DCAE)
    return network.to(device, dtype).eval().requires_grad_(False)


@torch.no_grad()
def input_of(network: DCAE, name: str, direction: str, pixels: int) -> Tensor:
    """Drawn scenes side by side or their latents; random ones for random weights."""
    generator = torch.Generator().manual_seed(0)
    if name == FULL_NAME and direction == DECODE:
        side = pixels // network.downsample_factor
        x = torch.randn(1, network.latent_channels, side, side, generator=generator)
    else:
        count, drawn = -(-pixels // 256), scenes(0)
        rows = [np.concatenate([draw_scene(next(drawn)) for _ in range(count)], axis=1) for _ in range(count)]
        image = torch.from_numpy(np.concatenate(rows)).permute(2, 0, 1)[None, :, :pixels, :pixels]
        x = image.float() / 127.5 - 1
    x = x.to(next(network.parameters()))
    if name == FULL_NAME or direction == ENCODE:
        return x
    return network.encode(x)


def our_run(network: DCAE, direction: str, x: Tensor) -> Callable[[], Tensor]:
    """Encodes or decodes as the network's tiling says at that time."""
    run = network.encode if direction == ENCODE else network.decode

    @torch.inference_mode()
    def exact() -> Tensor:
        with exact_convolutions():
            return run(x)

    return exact


def their_run(network: Any, direction: str, x: Tensor, scale: float) -> Callable[[], Tensor]:
    """The same with diffusers' network; latents are scaled by `scale`, as ours."""

    @torch.inference_mode()
    def run() -> Tensor:
        with exact_convolutions():
            if direction == ENCODE:
                return network.encode(x, return_dict=False)[0] * scale
            return network.decode(x / scale, return_dict=False)[0]

    return run


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """RMS ratio, and greatest difference over the range."""
    difference, expected = (actual - expected).double(), expected.double()
    spread = float(expected.max() - expected.min())
    return float(difference.norm() / expected.norm()), float(difference.abs().max()) / spread


class Counter(MemoryTracker):
    """Leaves out packed copies of weights, which a first run makes, and which have no storage to look at."""

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided:
            super()._see(tensor)


def counted(run: Callable[[], Tensor], device: str) -> tuple[Tensor, float, int]:
    """Result, seconds and peak bytes of one run."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        out = run()
        torch.cuda.synchronize()
        return out, time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
    started = time.perf_counter()
    with Counter() as tracker:
        out = run()
    return out, time.perf_counter() - started, tracker.peak


def measure(run: Callable[[], Tensor], device: str, *, once: bool) -> tuple[Tensor, float, int]:
    """As `counted`; the time is that of a run before, in which nothing is counted, unless `once`."""
    if once:
        return counted(run, device)
    run()
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    out, _, peak = counted(run, device)
    return out, took, peak


def measure_curve(name: str, direction: str, pixels: int, device: str, tick: Callable[[], object]) -> Curve:
    """All points of one curve; `tick` is called after each."""
    dtype = torch.float32 if device == "cpu" or name == BUNDLED_NAME else torch.bfloat16
    network, once = network_of(name, device, dtype), name == FULL_NAME and device == "cpu"
    x = input_of(network, name, direction, pixels)
    ours = our_run(network, direction, x)
    corner = 256 if direction == ENCODE else 8
    our_run(network, direction, x[..., :corner, :corner])()  # weights are packed at the first use
    curve = Curve(name, direction, pixels, "fp32" if dtype == torch.float32 else "bf16")

    def add(side: str, tile: int, run: Callable[[], Tensor], whole: Tensor | None) -> Tensor:
        out, seconds, peak = measure(run, device, once=once)
        rms, most = (0.0, 0.0) if whole is None else errors(out, whole)
        curve.points.append(Point(side, tile, seconds, peak, rms, most))
        tick()
        return out

    network.disable_tiling()
    whole = add(OURS, 0, ours, None)
    for tile in tiles_of(pixels):
        network.tiling = Tiling(tile, tile, tile, tile)
        add(OURS, tile, ours, whole)
    del whole, ours
    other = diffusers_autoencoder(network)
    theirs = their_run(other, direction, x, network.scaling_factor)
    del network
    whole = add(THEIRS, 0, theirs, None)
    if pixels > other.tile_sample_min_height:
        other.enable_tiling()
        add(THEIRS, other.tile_sample_stride_height, theirs, whole)
    return curve


def tiles_of(pixels: int) -> list[int]:
    """The tiles that cut an image of this size."""
    return [tile for tile in TILES if tile < pixels]


def markdown(curves: Sequence[Curve], about: dict[str, Any]) -> str:
    """Tables of all curves."""
    lines = [
        f"# Tiles of the autoencoder: {about['name']}", "",
        f"{about['date']}, torch {about['versions']['torch']}, diffusers {about['versions']['diffusers']}, commit "
        f"{about['commit']}, load {about['load_before']} before. Command: `{about['command']}`.", "",
        "Peaks are bytes above the weights and the input. Errors are those of tiles against the same side's whole run.",
    ]  # fmt: skip
    for curve in curves:
        lines += ["", f"## {curve.network}, {curve.direction} at {curve.pixels} px, {curve.dtype}", ""]
        lines += ["| side | tile, px | seconds | peak, MiB | RMS ratio | greatest of the range |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for point in [*curve.of(OURS), *curve.of(THEIRS)]:
            error = f"{point.rms:.1e} | {point.most:.1e}" if point.tile else "|"
            size = point.tile or "whole"
            lines.append(f"| {point.side} | {size} | {point.seconds:.2f} | {point.peak_bytes / 2**20:.0f} | {error} |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.tiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--suite", choices=tuple(SIZES), help="[by the machine]")
    for name in (BUNDLED_NAME, FULL_NAME):
        flag = "--bundled" if name == BUNDLED_NAME else "--full"
        add(flag, type=int, nargs="*", metavar="PIXELS", help=f"sizes for {name} [the suite's]")
    add("--directions", nargs="+", choices=(DECODE, ENCODE), default=[DECODE, ENCODE])
    add("--output", type=Path, metavar="DIR", help="[asset/docs/benchmarks, or output/benchmarks for quick]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    suite = options.suite or ("gpu" if gpu else "cpu")
    device = "cuda" if gpu and suite != "cpu" else "cpu"
    given = {BUNDLED_NAME: options.bundled, FULL_NAME: options.full}
    sizes = {name: SIZES[suite][name] if given[name] is None else given[name] for name in given}
    if bad := [size for some in sizes.values() for size in some if size < 256 or size % 32]:
        parser.error(f"sizes must be multiples of 32 from 256 on, not {bad[0]}")
    about = environment.collect(device, arguments)
    about["command"] = about["command"].replace("tools.bench", "tools.bench.tiling", 1)
    work = [(n, d, size) for n, some in sizes.items() for size in some for d in options.directions]
    with tqdm(total=sum(len(tiles_of(size)) + 2 + (size > 512) for *_, size in work), unit="run") as bar:
        curves = [measure_curve(*one, device, bar.update) for one in work]
    target = options.output or ROOT / ("output/benchmarks" if suite == "quick" else "asset/docs/benchmarks")
    paths = write(curves, about, target)
    print(markdown(curves, about))
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return 0


def write(curves: Sequence[Curve], about: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the three files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"tiling-{about['slug']}.{kind}" for kind in ("json", "md", "png")]
    content = {"schema": 1, "environment": about, "curves": [asdict(curve) for curve in curves]}
    paths[0].write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(curves, about), encoding="utf-8")
    draw(content, paths[2])
    return paths


if __name__ == "__main__":
    sys.exit(main())
