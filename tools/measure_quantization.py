"""What quantised weights save and what they do to pictures of the bundled model on a CPU: JSON and a Markdown table.

    python tools/measure_quantization.py --json asset/docs/quantization.json --markdown asset/docs/quantization.md
    python tools/measure_quantization.py --n 5 --rounds 2 --only int8 nf4
    python tools/measure_quantization.py --json asset/docs/quantization.json --add

Every case draws the same prompts from the same noise as the bf16 run. Bytes are those of the weights as they are held;
"packed" are the copies of exact weights that a CPU computes with. The peak is all of these, the autoencoder's weights,
and the most that was allocated besides at a time while one picture was drawn (torch.profiler). Seconds are medians over
rounds in which every case draws one picture after the other, the ratio is the median over rounds of that to bf16. PSNR
is of pixels in [0, 1]; MS-SSIM is no network's opinion but a formula (tools/picture_distance.py), instead of LPIPS,
whose weights would have to be fetched; the judge's score is ALL of tools/score_scenes.py. Schemes that need CUDA are
emulated (tools/emulated_quantization.py): sizes by arithmetic and errors of pictures, without memory and time. --add
draws nothing but these and puts them into the report that --json has, drawn before with the same settings. Exit code 2:
wrong arguments; 1: no model.
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
from sana.models.quantization.kernels import require, require_package
from sana.models.quantization.schemes import SCHEMES
from sana.ops.packing import pack_budget
from sana.pipelines.memory.networks import packed_bytes
from sana.pipelines.sana_pipeline import SanaPipeline
from tools.emulated_quantization import EMULATED, EmulatedLinear, emulate, emulated_bytes
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
    """One row of the table: its name, the dtype of what is exact, the schemes, and whether blocks are stored in fp8.

    An emulated one has neither memory nor time.
    """

    name: str
    dtype: str = "bf16"
    transformer: str | None = None
    text_encoder: str | None = None
    casting: bool = False
    keep: tuple[str, ...] = ()
    emulated: bool = False


KEPT = {"int4": ("*.mlp.point_conv",)}  # of the bundled model: 560 inputs are no multiple of 32


def cases_of(scheme: str) -> tuple[Case, Case]:
    """Returns the rows of a scheme: the transformer alone, and the text encoder as well."""
    emulated, keep = scheme in EMULATED, KEPT.get(scheme, ())
    name = ", ".join((scheme, *(f"{pattern.removeprefix('*.')} exact" for pattern in keep)))
    mark = " (emulated)" if emulated else ""
    return (
        Case(name + mark, transformer=scheme, keep=keep, emulated=emulated),
        Case(f"{name}, text {scheme}{mark}", transformer=scheme, text_encoder=scheme, keep=keep, emulated=emulated),
    )


CASES = (
    Case(REFERENCE),
    Case("fp32", dtype="fp32"),
    Case("fp8 storage (layerwise casting)", casting=True),
    *(cases_of(name)[0] for name in SCHEMES),
    *(cases_of(name)[1] for name in SCHEMES),
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
    parser.add_argument("--add", action="store_true", help="keep the other rows of --json, and draw the emulated ones")
    options = parser.parse_args(arguments)
    if options.n < 5 or options.n % 5 or options.rounds < 1:
        parser.error(f"--n must be a positive multiple of 5 and --rounds positive, not {options.n}, {options.rounds}")
    cases = cases_here()
    known = [case.name for case in cases]
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only: no case {unknown[0]!r} here; known: {', '.join(known)}")
    chosen = [case for case in cases if case.name == REFERENCE or case.name in (options.only or known)]
    if options.add:
        chosen = [case for case in chosen if case.emulated or case.name == REFERENCE]
        if not options.json or len(chosen) == 1:
            parser.error("--add needs --json, and emulated cases if --only is given")
    try:
        earlier = json.loads(options.json.read_text(encoding="utf-8")) if options.add else None
        pipelines = {case.name: load(case, options.model) for case in tqdm(chosen, desc="loading")}
        report = about(options, arguments)
        check_alike(report, earlier)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report["cases"] = measure(chosen, pipelines, options)
    report = report if earlier is None else added(report, earlier)
    for path, text in ((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, table(report))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(table(report))
    return 0


def check_alike(report: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    """Raises ValueError where rows of two reports cannot stand in one table."""
    for key in ("pictures", "steps", "guidance_scale") if earlier else ():
        if report[key] != earlier[key]:
            raise ValueError(f"--add: the report has {key} {earlier[key]}, and this run {report[key]}.")


def added(report: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Returns an earlier report with the emulated rows of a new one, and how those came about."""
    fresh = {case["name"]: case for case in report["cases"] if case["emulated"]}
    order = [case.name for case in CASES]
    cases = {case["name"]: case for case in earlier["cases"]} | fresh
    how = {key: report[key] for key in ("command", "date", "machine", "torch")}
    return {**earlier, "emulated": how, "cases": sorted(cases.values(), key=lambda case: order.index(case["name"]))}


def cases_here() -> list[Case]:
    """Returns the cases whose schemes a CPU has, or that are emulated, and whose packages are installed."""
    found = []
    for case in CASES:
        try:
            for scheme in (case.transformer, case.text_encoder):
                if scheme and case.emulated:
                    require_package(scheme)
                elif scheme:
                    require(scheme, torch.device("cpu"))
        except ValueError:  # the table says which rows there are
            continue
        found.append(case)
    return found


def load(case: Case, model: str) -> SanaPipeline:
    """Returns a pipeline of a case on the CPU, all its networks loaded."""
    pipeline = SanaPipeline.from_pretrained(model, device="cpu", dtype=case.dtype)
    if case.emulated:
        if case.transformer:
            emulate(pipeline.transformer, case.transformer, case.keep)
        if case.text_encoder:
            emulate(pipeline.text_encoder, case.text_encoder)
    elif case.transformer or case.text_encoder:
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
    timed = {case.name: pipelines[case.name] for case in cases if not case.emulated and not options.add}
    peaks = {name: measured_peak(partial(one, pipeline, scenes[0], options), "cpu") for name, pipeline in timed.items()}
    seconds = clock(timed, scenes[0], options)
    for result in results:
        if result["name"] not in timed:
            continue
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
        "transformer_bytes": network_bytes(transformer),
        "text_encoder_bytes": network_bytes(encoder),
        "autoencoder_bytes": stored_bytes(pipeline.autoencoder),
        "packed_bytes": packed_bytes(transformer, pack_budget()),
    }


def network_bytes(network: torch.nn.Module) -> int:
    """Returns the bytes of a network's weights; of an emulated one those that it would have."""
    emulated = any(isinstance(module, EmulatedLinear) for module in network.modules())
    return emulated_bytes(network) if emulated else stored_bytes(network)


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
EMULATION = """
Emulated rows: these schemes compute on CUDA only. Their rounding is done in plain PyTorch: int4 weights to 16 levels a
group and back, products in bfloat16; fp8 weights and inputs to e4m3 with a scale a row, sums in float32. Sizes are
arithmetic; memory and time are not measured yet (they need CUDA).
"""


def table(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    emulated = any(case.get("emulated") for case in report["cases"])
    lines = [
        HEAD + EMULATION * emulated,
        "| case | transformer, MB | text encoder, MB | packed, MB | peak, MB | seconds | time / bf16 | "
        "median PSNR, dB | worst PSNR, dB | mean MS-SSIM | worst MS-SSIM | judge, ALL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        sizes = [f"{case[f'{key}_bytes'] / 1e6:.2f}" for key in ("transformer", "text_encoder")]
        if case.get("emulated"):
            taken = ["-", *("not measured yet (needs CUDA)",) * 2, "-"]
        else:
            taken = [f"{case['packed_bytes'] / 1e6:.2f}", f"{case['peak_bytes'] / 1e6:.2f}"]
            taken += [f"{case['seconds']:.2f}", f"{case['ratio']:.2f}"]
        psnr = ("equal" if case[key] is None else f"{case[key]:.1f}" for key in ("psnr_median", "psnr_worst"))
        alike = (f"{case[key]:.4f}" for key in ("ms_ssim_mean", "ms_ssim_worst"))
        cells = [case["name"], *sizes, *taken, *psnr, *alike]
        lines.append(f"| {' | '.join(cells)} | {case['scores']['ALL']:.2f} |")
    about = (
        f"`{report['command']}`: {report['pictures']} pictures, {report['steps']} steps, guidance "
        f"{report['guidance_scale']:g}, what is not quantised in bfloat16; {report['date']}, {report['machine']}, "
        f"{report['threads']} thread(s), torch {report['torch']}, Python {report['python']}."
    )
    if how := report.get("emulated"):
        about += (
            f"\n\nEmulated rows: `{how['command']}`, with the same settings; {how['date']}, {how['machine']}, torch "
            f"{how['torch']}."
        )
    return "\n".join([*lines, "", about, ""])


if __name__ == "__main__":
    raise SystemExit(main())
