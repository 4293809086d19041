"""GenEval-like score of a model on drawn scenes: does the picture hold what the prompt says, and nothing else?

    python tools/score_scenes.py --n 250 --seed 0                       # the bundled model
    python tools/score_scenes.py --split seen --json scores.json        # prompts whose combinations were trained

n / 5 prompts each of single, two objects, count 2-4, colour and position make ALL, the mean of these five; the same
number of "two A and a B" and the direction alone (of the position pictures that hold both objects) are rows of their
own. With `--split unseen` (default) the (noun, noun) or (noun, colour) combination of two, colour and position prompts
never occurs in training. Extra objects count as wrong. Exit code 2: wrong arguments; 1: the model could not be loaded.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sana.data.scenes import KINDS, Scene, sample_scene
from tools.scene_judge import Detection, SceneJudge, background_name

MEAN_OF = ("single", "two", "count", "colour", "position")


def objects_match(scene: Scene, found: list[Detection]) -> bool:
    """Whether exactly the objects of the scene were found, with their colours when the caption names them."""
    wanted = Counter((item.noun, item.colour) for item in scene.objects)
    return wanted == Counter((item.noun, item.colour) for item in found)


def direction_matches(scene: Scene, found: list[Detection]) -> bool:
    """Whether the first object of a position scene stands where the relation says, seen from the second."""
    first, second = (next(d.centre for d in found if (d.noun, d.colour) == (o.noun, o.colour)) for o in scene.objects)
    down, right = second[0] - first[0], second[1] - first[1]
    along = {"to the left of": right, "to the right of": -right, "above": down, "below": -down}[str(scene.relation)]
    across = down if str(scene.relation).startswith("to the") else right
    return bool(along > abs(across))


def judge_picture(judge: SceneJudge, scene: Scene, image: np.ndarray) -> dict[str, bool | None]:
    """`correct`, `direction` (None where there is none or an object is missing) and `background` of one picture."""
    found = judge.detect(image)
    match = objects_match(scene, found)
    direction = direction_matches(scene, found) if match and scene.relation else None
    return {
        "correct": match and direction is not False,
        "direction": direction,
        "background": background_name(image) == scene.background,
    }


def prompts(count: int, seed: int, split: str) -> list[Scene]:
    """`count` scenes of each kind, none twice, whose captions are the prompts."""
    rng, chosen = np.random.default_rng(seed), []
    for kind in KINDS:
        captions: set[str] = set()
        while len(captions) < count:
            scene = sample_scene(rng, kind=kind, split=split)
            if scene.caption not in captions:
                captions.add(scene.caption)
                chosen.append(scene)
    return chosen


def summarise(scenes: list[Scene], verdicts: list[dict[str, bool | None]]) -> dict[str, float]:
    """Share of correct pictures of each kind, ALL, direction and background, each in [0, 1]."""
    rows = {
        kind: float(np.mean([bool(v["correct"]) for s, v in zip(scenes, verdicts, strict=True) if s.kind == kind]))
        for kind in KINDS
    }
    directions = [v["direction"] for v in verdicts if v["direction"] is not None]
    return {
        "ALL": float(np.mean([rows[kind] for kind in MEAN_OF])),
        **rows,
        "direction": float(np.mean(directions)) if directions else float("nan"),
        "background": float(np.mean([bool(v["background"]) for v in verdicts])),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset/models/sana_tiny", help="model folder")
    parser.add_argument("--n", type=int, default=250, help="prompts of the five kinds together; a multiple of 5")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; picture i uses seed + i")
    parser.add_argument("--split", choices=("unseen", "seen"), default="unseen")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg_scale", type=float, default=4.5)
    parser.add_argument("--bs", type=int, default=10, help="pictures per call")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--save_dir", type=Path, help="also write every picture here")
    options = parser.parse_args(arguments)
    if options.n < 5 or options.n % 5:
        parser.error(f"--n must be a positive multiple of 5, not {options.n}")
    chosen = prompts(options.n // 5, options.seed, "train" if options.split == "seen" else "unseen")
    try:
        pictures = generate(options, chosen)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    judge = SceneJudge()
    verdicts = [judge_picture(judge, scene, image) for scene, image in zip(chosen, pictures, strict=True)]
    if options.save_dir:
        options.save_dir.mkdir(parents=True, exist_ok=True)
        for index, (scene, image, verdict) in enumerate(zip(chosen, pictures, verdicts, strict=True)):
            mark = "right" if verdict["correct"] else "wrong"
            name = scene.caption.replace(" ", "_")
            Image.fromarray(image).save(options.save_dir / f"{scene.kind}_{index:03d}_{mark}_{name}.png")
    scores = summarise(chosen, verdicts)
    for name, value in scores.items():
        print(f"{name:12s} {value:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"split": options.split, "n": options.n, "seed": options.seed, **scores}))
    return 0


def generate(options: argparse.Namespace, chosen: list[Scene]) -> list[np.ndarray]:
    """One (256, 256, 3) uint8 picture for each scene's caption."""
    from sana import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(options.model)
    pictures: list[np.ndarray] = []
    for start in tqdm(range(0, len(chosen), options.bs), desc="drawing"):
        batch = chosen[start : start + options.bs]
        images = pipeline(
            [scene.caption for scene in batch], height=256, width=256, num_inference_steps=options.steps,
            guidance_scale=options.cfg_scale, seed=options.seed + start, output_type="pil",
        )  # fmt: skip
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures


if __name__ == "__main__":
    raise SystemExit(main())
