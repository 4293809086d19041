"""Draws scenes of the data set: a sheet to look at, or a folder of pictures with captions.

    python tools/draw_scenes.py --n 16                             # output/scenes.png
    python tools/draw_scenes.py --n 1000 --folder output/scenes    # 00000000.png + 00000000.txt, a training folder

Exit code 2: wrong arguments.
"""

import argparse
import itertools
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sana.data.scenes import draw_scene, scenes
from sana.pipelines.images import contact_sheet


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "unseen", "any"), default="train")
    parser.add_argument("--output", type=Path, default=Path("output/scenes.png"), help="sheet to write")
    parser.add_argument("--folder", type=Path, help="write single pictures and captions here instead")
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error(f"--n must be at least 1, not {options.n}")
    stream = itertools.islice(scenes(options.seed, split=options.split), options.n)
    if options.folder is None:
        drawn = list(stream)
        pictures = [Image.fromarray(draw_scene(scene)) for scene in drawn]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures, [scene.caption for scene in drawn]).save(options.output)
        print(options.output)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(tqdm(stream, total=options.n)):
        Image.fromarray(draw_scene(scene)).save(options.folder / f"{index:08d}.png")
        (options.folder / f"{index:08d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    print(options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
