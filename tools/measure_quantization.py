"""What quantised weights save and what they do to pictures of the bundled model on a CPU: JSON and a Markdown table.

    python tools/measure_quantization.py --json asset/docs/quantization.json --markdown asset/docs/quantization.md
    python tools/measure_quantization.py --n 5 --rounds 2 --only int8 nf4

Every case draws the same prompts from the same noise as the bf16 run. Bytes are those of the weights as they are held;
"packed" are the copies of exact weights that a CPU computes with. The peak is all of these, the autoencoder's weights,
and the most that was allocated besides at a time while one picture was drawn (torch.profiler). Seconds are medians over
rounds in which every case draws one picture after the other, the ratio is the median over rounds of that to bf16. PSNR
is of pixels in [0, 1]; MS-SSIM is no network's opinion but a formula (tools/picture_distance.py), instead of LPIPS,
whose weights would have to be fetched; the judge's score is ALL of tools/score_scenes.py. Exit code 2: wrong arguments;
1: no model.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sana.data.scenes import Scene
from sana.models.quantization.kernels import require
from sana.models.quantization.schemes import SCHEMES
from sana.ops.packing import pack_budget
from sana.pipelines.memory.networks import packed_bytes
from sana.pipelines.sana_pipeline import SanaPipeline
from tools.measure_approximations import SIZE, Run, circumstances, compare, draw, judged
from tools.measure_approximations import Case as Options
from tools.measure_memory import measured_peak, stored_bytes
from tools.picture_distance import ms_ssim
from tools.scene_judge import SceneJudge
from tools.score_scenes import prompts

REFERENCE = "bf16"
COUNTED = ("transformer", "text_encoder", "autoencoder", "packed", "allocated")  # what the peak is made of
UNCHANGED = ("rows_a_picture", "flops")  # by what these cases do


@dataclass(frozen=True)
class Case:
    """One row of the table: its name, the dtype of what is exact, the schemes, and whether blocks are stored in fp8."""

    name: str
    dtype: str = "bf16"
    transformer: str | None = None
    text_encoder: str | None = None
    casting: bool = False
    keep: tuple[str, ...] = ()


CASES = (
    Case(REFERENCE),
    Case("fp32", dtype="fp32"),
    Case("fp8 storage (layerwise casting)", casting=True),
    *(Case(name, transformer=name) for name in SCHEMES),
    *(Case(f"{name}, text {name}", transformer=name, text_encoder=name) for name in SCHEMES),
    Case("nf4, first and last block exact", transformer="nf4", keep=("blocks.0.*", "blocks.5.*")),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset/models/sana_tiny", help="model folder")
    parser.add_argument("--n", type=int, default=25, help="prompts of the five scored kinds together; a multiple of 5")
    parser.add_argument("--rounds", type=int, default=7, help="of the clock")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; picture i uses seed + i")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg_scale", type=float, default=4.5)
    parser.add_argument("--bs", type=int, default=10, help="pictures per call")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"only these cases; {REFERENCE} is always run")
    machine = platform.processor() or platform.machine()
    parser.add_argument("--machine", default=machine, help="its name in the report")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)
    if options.n < 5 or options.n % 5 or options.rounds < 1:
        parser.error(f"--n must be a positive multiple of 5 and --rounds positive, not {options.n}, {options.rounds}")
    cases = cases_here()
    known = [case.name for case in cases]
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only: no case {unknown[0]!r} here; known: {', '.join(known)}")
    chosen = [case for case in cases if case.name == REFERENCE or case.name in (options.only or known)]
    try:
        pipelines = {case.name: load(case, options.model) for case in tqdm(chosen, desc="loading")}
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {**about(options, arguments), "cases": measure(chosen, pipelines, options)}
    for path, text in ((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, table(report))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(table(report))
    return 0


def cases_here() -> list[Case]:
    """Returns the cases whose schemes a CPU has and whose packages are installed."""
    found = []
    for case in CASES:
        try:
            for scheme in (case.transformer, case.text_encoder):
                if scheme:
                    require(scheme, torch.device("cpu"))
        except ValueError:  # the table says which rows there are
            continue
        found.append(case)
    return found


def load(case: Case, model: str) -> SanaPipeline:
    """Returns a pipeline of a case on the CPU, all its networks loaded."""
    pipeline = SanaPipeline.from_pretrained(model, device="cpu", dtype=case.dtype)
    if case.transformer or case.text_encoder:
        pipeline.quantize(case.transformer, case.text_encoder, keep=case.keep)
    _ = pipeline.text_encoder, pipeline.autoencoder  # loaded when first asked for
    if case.casting:
        pipeline.enable_layerwise_casting()
    return pipeline


def measure(cases: list[Case], pipelines: dict[str, SanaPipeline], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all cases, the reference first; returns one dict of numbers for each."""
    scenes, judge = prompts(options.n // 5, options.seed, "unseen"), SceneJudge()
    reference: Run | None = None
    results: list[dict[str, Any]] = []
    for case in tqdm(cases, desc="drawing"):
        pipeline = pipelines[case.name]
        run = draw(pipeline, scenes, Options(case.name), options)
        reference = reference or run
        errors = {key: value for key, value in compare(run, reference).items() if key not in UNCHANGED}
        alike = ms_ssim(run.images, reference.images)
        errors |= {"ms_ssim_mean": float(alike.mean()), "ms_ssim_worst": float(alike.min())}
        scores = judged(judge, scenes, run.images)
        results.append({**dataclasses.asdict(case), **held(pipeline), **errors, **scores})
    peaks = {
        name: measured_peak(partial(one, pipeline, scenes[0], options), "cpu") for name, pipeline in pipelines.items()
    }
    seconds = clock(pipelines, scenes[0], options)
    for result in results:
        result["allocated_bytes"] = peaks[result["name"]]
        result["peak_bytes"] = sum(result[f"{key}_bytes"] for key in COUNTED)
        own, other = seconds[result["name"]], seconds[REFERENCE]
        result["seconds"] = statistics.median(own)
        result["ratio"] = statistics.median(a / b for a, b in zip(own, other, strict=True))
    return results


def held(pipeline: SanaPipeline) -> dict[str, int]:
    """Returns the bytes of the weights of each network, and of packed copies of the transformer's."""
    transformer, encoder = pipeline.transformer, pipeline.text_encoder
    assert transformer is not None and isinstance(encoder, torch.nn.Module)
    return {
        "transformer_bytes": stored_bytes(transformer),
        "text_encoder_bytes": stored_bytes(encoder),
        "autoencoder_bytes": stored_bytes(pipeline.autoencoder),
        "packed_bytes": packed_bytes(transformer, pack_budget()),
    }


def one(pipeline: SanaPipeline, scene: Scene, options: argparse.Namespace) -> Any:
    """Draws one picture, its prompt encoded anew."""
    pipeline.text_features.clear()
    return pipeline(
        scene.caption, height=SIZE, width=SIZE, seed=options.seed, num_inference_steps=options.steps,
        guidance_scale=options.cfg_scale, output_type="pt", progress_bar=False,
    )  # fmt: skip


def clock(pipelines: dict[str, SanaPipeline], scene: Scene, options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns the seconds of one picture by case and round; everything was run before."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in tqdm(range(options.rounds), desc="timing"):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            one(pipeline, scene, options)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def about(options: argparse.Namespace, arguments: list[str] | None) -> dict[str, Any]:
    """Returns where and how the numbers came about."""
    found = circumstances(options, arguments)
    return {**found, "command": found["command"].replace("measure_approximations", "measure_quantization")}


HEAD = """# Quantised weights: what they save, and what they do to pictures

The bundled model on a CPU, against itself in bf16 (autoencoder float32). Packed: copies of exact weights in the CPU's
layout. Peak: all tensors of one picture. PSNR and MS-SSIM (multi-scale structural similarity, 1 is equal; it stands in
for LPIPS, whose weights are not bundled): the same seeds in bf16. Judge: share of pictures that show what the prompt
says. A worst PSNR near 15 dB is that of a picture which the judge accepts too. No GPU has been measured.
"""


def table(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    lines = [
        HEAD,
        "| case | transformer, MB | text encoder, MB | packed, MB | peak, MB | seconds | time / bf16 | "
        "median PSNR, dB | worst PSNR, dB | mean MS-SSIM | worst MS-SSIM | judge, ALL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        sizes = (f"{case[f'{key}_bytes'] / 1e6:.2f}" for key in ("transformer", "text_encoder", "packed", "peak"))
        psnr = ("equal" if case[key] is None else f"{case[key]:.1f}" for key in ("psnr_median", "psnr_worst"))
        alike = (f"{case[key]:.4f}" for key in ("ms_ssim_mean", "ms_ssim_worst"))
        cells = [case["name"], *sizes, f"{case['seconds']:.2f}", f"{case['ratio']:.2f}", *psnr, *alike]
        lines.append(f"| {' | '.join(cells)} | {case['scores']['ALL']:.2f} |")
    about = (
        f"`{report['command']}`: {report['pictures']} pictures, {report['steps']} steps, guidance "
        f"{report['guidance_scale']:g}, what is not quantised in bfloat16; {report['date']}, {report['machine']}, "
        f"{report['threads']} thread(s), torch {report['torch']}, Python {report['python']}."
    )
    return "\n".join([*lines, "", about, ""])


if __name__ == "__main__":
    raise SystemExit(main())
