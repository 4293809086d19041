"""How much `upscale_from` helps above the size a model was trained at: scores by size and strength, and a picture.

    python tools/measure_upscaling.py --n 60 --seed 0 --json scores.json
    python tools/measure_upscaling.py --n 20 --seed 1 --sizes 512 --sheet asset/docs/upscale_from.png

For the model that draws scenes. Every picture is made down to the trained size before it is judged (`scene_judge.py`),
for the judge knows objects at that size. Prompts hold combinations that were not trained; `--n` is their number, a
fifth of each kind. Exit code 2: wrong arguments.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sana import SanaPipeline
from sana.data.scenes import Scene
from sana.pipelines.images import contact_sheet, save_png
from tools.scene_judge import SceneJudge
from tools.score_scenes import MEAN_OF, judge_picture, prompts

PLAIN = "plain"
SHOWN = 4  # prompts of the sheet, each of another kind


def conditions(strengths: list[float]) -> dict[str, dict[str, float]]:
    """Returns name -> what is added to a call; the size that is started from is not in it."""
    return {PLAIN: {}} | {f"{strength:g}": {"upscale_strength": strength} for strength in strengths}


def draw(pipeline: SanaPipeline, scene: Scene, size: int, base: int, seed: int, extra: dict[str, Any]) -> Image.Image:
    """Returns one square picture: plain, or with a strength started from one of `base` pixels."""
    start = {"upscale_from": base} if extra else {"use_resolution_binning": False}
    options = {"seed": seed, "output_type": "pil", "progress_bar": False}
    (picture,) = pipeline(scene.caption, size, size, **start, **extra, **options)
    return picture


def score(judge: SceneJudge, scenes: list[Scene], pictures: list[Image.Image], base: int) -> dict[str, float]:
    """Returns the share of pictures that show their prompt, by kind and (ALL) as the mean of the kinds."""
    right: dict[str, list[bool]] = {kind: [] for kind in MEAN_OF}
    for scene, picture in zip(scenes, pictures, strict=True):
        small = np.asarray(picture.resize((base, base), Image.Resampling.LANCZOS))
        right[scene.kind].append(bool(judge_picture(judge, scene, small)["correct"]))
    rows = {kind: float(np.mean(verdicts)) for kind, verdicts in right.items()}
    return {"ALL": float(np.mean(list(rows.values()))), **rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset/models/sana_tiny", help="model folder")
    parser.add_argument("--n", type=int, default=60, help="prompts; a multiple of 5")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; picture i uses 1000 * seed + i")
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 512], help="sides of the pictures")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.17, 0.31, 0.5, 0.63, 0.73, 0.86])
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--sheet", type=Path, help="write pictures of four prompts here, one row a prompt")
    options = parser.parse_args(arguments)
    if options.n < 5 or options.n % 5:
        parser.error(f"--n must be a positive multiple of 5, not {options.n}")
    pipeline = SanaPipeline.from_pretrained(options.model, device="cpu")
    base = pipeline.config.model.image_size
    scenes = [scene for scene in prompts(options.n // 5, options.seed, "unseen") if scene.kind in MEAN_OF]
    judge, scores, drawn = SceneJudge(), {}, {}
    for size in [base, *options.sizes]:
        for name, extra in conditions(options.strengths if size > base else []).items():
            pictures = [
                draw(pipeline, scene, size, base, 1000 * options.seed + index, extra)
                for index, scene in enumerate(tqdm(scenes, desc=f"{size} px, {name}", disable=None))
            ]
            drawn[size, name] = pictures
            scores[f"{size} {name}"] = row = score(judge, scenes, pictures, base)
            print(f"{size:5d} px {name:6s}", *(f"{kind} {value:.2f}" for kind, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"n": options.n, "seed": options.seed, "scores": scores}, indent=1) + "\n")
    if options.sheet:
        write_sheet(options.sheet, scenes, drawn)
    return 0


def write_sheet(path: Path, scenes: list[Scene], drawn: dict[tuple[int, str], list[Image.Image]]) -> None:
    """Writes the pictures of the first prompt of four kinds, one row a prompt, one column a condition."""
    first = {scene.kind: index for index, scene in reversed(list(enumerate(scenes)))}
    shown = [first[kind] for kind in MEAN_OF if kind in first][:SHOWN]
    cells, captions = [], []
    for index in shown:
        for (size, name), pictures in drawn.items():
            cells.append(pictures[index])
            captions.append(f"{size} px, {name if name == PLAIN else f'strength {name}'}: {scenes[index].caption}")
    sheet = contact_sheet(cells, captions, columns=len(drawn), cell=192)
    save_png(sheet.quantize(256), path, {})


if __name__ == "__main__":
    sys.exit(main())
