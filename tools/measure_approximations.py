"""What each opt-in approximation does to pictures of the bundled model, and what it saves: JSON and a Markdown table.

    python tools/measure_approximations.py --n 50 --json asset/docs/approximations.json     # the table of the docs
    python tools/measure_approximations.py --n 5 --only exact "step cache 0.2"

Every case draws the same prompts from the same noise as the exact run. PSNR and the greatest difference are of pixels
in [0, 1]; the RMS ratio is of all latents together; the judge's score is ALL of tools/score_scenes.py. Work is counted,
not timed: rows are forward passes of one picture through the transformer (two a step under guidance), FLOPs are those
of the rows' blocks. Cases with fewer steps are no approximation: they are what less work buys without one. Exit code 2:
wrong arguments; 1: no model.
"""

import argparse
import copy
import datetime
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana.data.scenes import Scene
from sana.diffusion import SAMPLERS
from sana.diffusion.guidance import Guidance
from sana.models.quantization.fp8 import quantize_fp8
from sana.pipelines.approximations import first_tokens, plan_evaluations
from sana.pipelines.sana_pipeline import SanaPipeline
from tools.scene_judge import SceneJudge
from tools.score_scenes import judge_picture, prompts, summarise

SIZE = 256
CLOSE = 30.0  # dB; a picture below it is visibly another one


@dataclass(frozen=True)
class Case:
    """One row of the table: its name, what is asked of the pipeline beside prompts and seeds, and of the weights."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    fp8: dict[str, Any] | None = None


CASES = (
    Case("exact"),
    Case("fp8", fp8={}),
    Case("step cache 0.1", {"step_cache": 0.1}),
    Case("step cache 0.2", {"step_cache": 0.2}),
    Case("step cache 0.3", {"step_cache": 0.3}),
    Case("guidance interval 0.3-1", {"interval_guidance": (0.3, 1.0)}),
    Case("guidance interval 0.6-1", {"interval_guidance": (0.6, 1.0)}),
    Case("guidance interval 0-0.95", {"interval_guidance": (0.0, 0.95)}),
    Case("24 text tokens", {"max_text_tokens": 24}),
    Case("16 text tokens", {"max_text_tokens": 16}),
    Case("12 text tokens", {"max_text_tokens": 12}),
    Case("fp8, cache 0.2, interval 0.6-1", {"step_cache": 0.2, "interval_guidance": (0.6, 1.0)}, {}),
    Case("14 steps", {"num_inference_steps": 14}),
    Case("8 steps", {"num_inference_steps": 8}),
)


@dataclass
class Run:
    """What a case made and what it took, for all prompts."""

    latents: Tensor  # (P, C, h, w)
    images: Tensor  # (P, 3, H, W) in [0, 1]
    rows: int
    flops: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset/models/sana_tiny", help="model folder")
    parser.add_argument("--n", type=int, default=50, help="prompts of the five scored kinds together; a multiple of 5")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; picture i uses seed + i")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg_scale", type=float, default=4.5)
    parser.add_argument("--bs", type=int, default=10, help="pictures per call")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these cases; exact is always run")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="its name in the report")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)
    if options.n < 5 or options.n % 5:
        parser.error(f"--n must be a positive multiple of 5, not {options.n}")
    known = [case.name for case in CASES]
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only: no case {unknown[0]!r}; known: {', '.join(known)}")
    try:
        pipeline = SanaPipeline.from_pretrained(options.model)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chosen = [case for case in CASES if case.name == "exact" or case.name in (options.only or known)]
    results = measure(pipeline, chosen, options)
    report = {**circumstances(options, arguments), "cases": results}
    for path, text in ((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, table(report))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(table(report))
    return 0


def measure(pipeline: SanaPipeline, cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all cases, the exact one first; returns one dict of numbers for each."""
    scenes, judge = prompts(options.n // 5, options.seed, "unseen"), SceneJudge()
    exact: Run | None = None
    results = []
    for case in cases:
        with weights_of(case, pipeline):
            run = draw(pipeline, scenes, case, options)
        exact = exact or run
        results.append({"name": case.name, **compare(run, exact), **judged(judge, scenes, run.images)})
        print(f"{case.name}: {results[-1]}", file=sys.stderr)
    return results


@contextmanager
def weights_of(case: Case, pipeline: SanaPipeline) -> Iterator[None]:
    """Gives the pipeline an fp8 copy of its transformer for the time of a case that asks for one."""
    exact = pipeline.transformer
    assert exact is not None
    try:
        if case.fp8 is not None:
            quantised = copy.deepcopy(exact)
            quantize_fp8(quantised, backend="reference", **case.fp8)
            pipeline.transformer = quantised
        yield
    finally:
        pipeline.transformer = exact


def draw(pipeline: SanaPipeline, scenes: list[Scene], case: Case, options: argparse.Namespace) -> Run:
    """Makes one picture of each scene's caption."""
    request = {"num_inference_steps": options.steps, "guidance_scale": options.cfg_scale, **case.options}
    latents, images, flops = [], [], 0.0
    branches = branches_of_steps(pipeline, request)
    for start in range(0, len(scenes), options.bs):
        captions = [scene.caption for scene in scenes[start : start + options.bs]]
        seed = options.seed + start
        made = pipeline(
            captions, height=SIZE, width=SIZE, seed=seed, output_type="latent", progress_bar=False, **request
        )
        latents.append(made)
        with torch.inference_mode():
            images.append((pipeline.decode(made) / 2 + 0.5).clamp(0, 1))
        mask = first_tokens(pipeline.encode_prompts(captions), request.get("max_text_tokens")).mask
        for length in mask.sum(dim=1).tolist():
            flops += sum(branches) * row_flops(pipeline.transformer, made.shape[-2] * made.shape[-1], int(length))
    return Run(torch.cat(latents), torch.cat(images), sum(branches) * len(scenes), flops)


def branches_of_steps(pipeline: SanaPipeline, request: dict[str, Any]) -> list[int]:
    """Returns how many rows a picture takes at each step that evaluates the transformer."""
    scheduler = pipeline.config.scheduler
    sampler = SAMPLERS[scheduler.vis_sampler]
    times = sampler.times(request["num_inference_steps"], flow_shift=scheduler.flow_shift)
    interval = request.get("interval_guidance", (0.0, 1.0))
    guidance = Guidance("classifier-free", request["guidance_scale"], 1.0, interval)
    assert pipeline.transformer is not None
    evaluate = plan_evaluations(
        request.get("step_cache", 0.0),
        transformer=pipeline.transformer,
        sampler=sampler,
        times=times,
        guidance=guidance,
    )
    return [len(guidance.branches(time)) for time, run in zip(times.tolist(), evaluate, strict=False) if run]


def row_flops(transformer: Any, tokens: int, text: int) -> float:
    """Returns the FLOPs (2 a multiplication) of the blocks for one row; embeddings and the output layer are left out.

    Keys and values of the text, computed once a prompt, count for nothing here.
    """
    arch = transformer.architecture
    dim, hidden, head = arch.hidden_size, int(arch.hidden_size * arch.mlp_ratio), arch.linear_head_dim
    projections = 6 * dim * dim  # qkv, proj, and query and output of the cross-attention
    linear_attention, cross_attention = 2 * dim * head, 2 * dim * text
    mix_ffn = 2 * dim * hidden + 9 * 2 * hidden + hidden * dim
    return 2.0 * arch.depth * tokens * (projections + linear_attention + cross_attention + mix_ffn)


def compare(run: Run, exact: Run) -> dict[str, Any]:
    """Returns the errors of a case and the share of the exact run's work that it takes."""
    squared = (run.images - exact.images).double().square().flatten(1).mean(dim=1)
    psnr = [decibels(float(one)) for one in squared]
    ratio = (run.latents - exact.latents).double().square().mean() / exact.latents.double().square().mean()
    return {
        "psnr_median": decibels(float(squared.median())),
        "psnr_worst": decibels(float(squared.max())),
        "close": sum(one is None or one >= CLOSE for one in psnr) / len(psnr),
        "max_difference": float((run.images - exact.images).abs().max()),
        "latent_rms_ratio": math.sqrt(float(ratio)),
        "rows_a_picture": run.rows / len(run.images),
        "flops": run.flops / exact.flops,
    }


def decibels(squared_error: float) -> float | None:
    """Returns the PSNR of pixels in [0, 1]; None for equal pictures."""
    return -10 * math.log10(squared_error) if squared_error else None


def judged(judge: SceneJudge, scenes: list[Scene], images: Tensor) -> dict[str, Any]:
    """Returns the judge's scores."""
    pixels = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    verdicts = [judge_picture(judge, scene, image) for scene, image in zip(scenes, pixels, strict=True)]
    return {"scores": {name: value for name, value in summarise(scenes, verdicts).items() if value == value}}


def circumstances(options: argparse.Namespace, arguments: list[str] | None) -> dict[str, Any]:
    """Returns where and how the numbers came about."""
    command = ["python", "tools/measure_approximations.py", *(sys.argv[1:] if arguments is None else arguments)]
    return {
        "command": shlex.join(command),
        "date": datetime.date.today().isoformat(),
        "machine": options.machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pictures": len(prompts(options.n // 5, options.seed, "unseen")),
        "steps": options.steps,
        "guidance_scale": options.cfg_scale,
    }


def table(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    lines = [
        f"| case | rows a picture | FLOPs | median PSNR, dB | worst PSNR, dB | pictures of {CLOSE:g} dB or more | "
        "greatest difference | RMS ratio of latents | judge, ALL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        psnr, worst = ("equal" if case[key] is None else f"{case[key]:.1f}" for key in ("psnr_median", "psnr_worst"))
        lines.append(
            f"| {case['name']} | {case['rows_a_picture']:g} | {case['flops']:.0%} | {psnr} | {worst} | "
            f"{case['close']:.0%} | {case['max_difference']:.3f} | {case['latent_rms_ratio']:.1e} | "
            f"{case['scores']['ALL']:.2f} |"
        )
    about = (
        f"`{report['command']}`: {report['pictures']} pictures, {report['steps']} steps, guidance "
        f"{report['guidance_scale']:g}, float32; {report['date']}, {report['machine']}, {report['threads']} thread(s), "
        f"torch {report['torch']}, Python {report['python']}."
    )
    return "\n".join([*lines, "", about, ""])


if __name__ == "__main__":
    raise SystemExit(main())
