"""Draws asset/example_data again: twelve small pictures with captions, in every form that SanaImgDataset reads.

    python tools/make_example_data.py                          # asset/example_data
    python tools/make_example_data.py --folder output/example  # elsewhere

The same program draws the same pictures. Exit code 2: wrong arguments.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from sana.data.scenes import Scene, draw_scene, scenes
from sana.data.sprites import BACKGROUNDS

FOLDER = Path("asset/example_data")
SEED = 12
SIZES = {3: (288, 192), 4: (192, 288), 8: (320, 192), 9: (192, 320), 11: (256, 192)}  # (width, height) by number
FORMATS = (".png", ".jpg", ".png", ".jpeg", ".png", ".JPG", ".png", ".jpg", ".png", ".jpg", ".webp", ".PNG")
CAPTIONERS = {"VILA1-5-13B": (0, 1, 2, 3, 4, 5), "InternVL2-26B": (0, 2, 4, 6, 8)}
README = """Twelve drawn pictures that show what a training folder may look like. `python tools/make_example_data.py`
draws them again.

`NAME.txt` holds the caption. Some pictures have more captions and scores, in files that are named like those of
the captioners VILA1-5-13B and InternVL2-26B, because the configurations read these. Their texts are made by a template
from the drawing, and their scores by a rule: none of them comes from those models.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"folder to write (default {FOLDER})")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "README.md").write_text(README, encoding="utf-8")
    for number, scene in enumerate(itertools.islice(scenes(SEED), len(FORMATS))):
        write_example(options.folder, number, scene)
    print(options.folder)
    return 0


def write_example(folder: Path, number: int, scene: Scene) -> None:
    """Writes one picture and the files beside it."""
    name = f"{number:08d}"
    picture = framed(scene, *SIZES.get(number, (256, 256)))
    picture.save(folder / f"{name}{FORMATS[number]}", quality=90)
    (folder / f"{name}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    scored = False
    for captioner, numbers in CAPTIONERS.items():
        if number in numbers:
            write_json(folder / f"{name}_{captioner}.json", {name: {captioner: described(scene, captioner)}})
            score = round(24.0 + 1.5 * ((number + len(captioner)) % 6), 2)
            write_json(folder / f"{name}_{captioner}_clip_score.json", {name: {captioner: score}})
            scored = True
    if scored:
        write_json(folder / f"{name}_prompt_clip_score.json", {name: {"prompt": 27.0}})


def framed(scene: Scene, width: int, height: int) -> Image.Image:
    """Draws a scene into a picture of any size: shrunk to fit, on its own background."""
    drawn = Image.fromarray(draw_scene(scene))
    side = min(width, height)
    if drawn.size == (width, height):
        return drawn
    picture = Image.new("RGB", (width, height), tuple(np.asarray(BACKGROUNDS[scene.background], np.uint8).tolist()))
    picture.paste(drawn.resize((side, side), Image.Resampling.LANCZOS), ((width - side) // 2, (height - side) // 2))
    return picture


def described(scene: Scene, captioner: str) -> str:
    """Another caption of a scene, longer than its own."""
    if captioner == "VILA1-5-13B":
        return f"A simple drawing that shows {scene.caption}"
    kinds = dict.fromkeys(f"{item.colour} {item.noun}" if item.colour else item.noun for item in scene.objects)
    return f"{scene.caption}. Kinds of objects in this plain flat drawing: {', '.join(kinds)}. Nothing else is there."


def write_json(path: Path, content: dict[str, dict[str, float | str]]) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
