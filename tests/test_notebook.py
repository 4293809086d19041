"""The quickstart notebook runs offline and shows the pipeline's own pictures; what is stored in it is what it shows."""

import base64
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from sana.pipelines.images import to_pil
from sana.pipelines.sana_pipeline import SanaPipeline
from tools import make_notebook

ROOT = Path(__file__).parents[1]
SIDE, GAP, BELOW, EDGE = 192, 8, 30, 4  # of the notebook's show()
LEVELS = 2.0  # mean distance of pixels of 4 x 4 that JPEG leaves is 1.7 at most; two seeds are more than 8 apart
MAX_BYTES = 700_000


@pytest.fixture
def stored() -> nbformat.NotebookNode:
    return nbformat.read(make_notebook.QUICKSTART, as_version=4)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the repository, so that what the notebook writes lands in its output/."""
    for name in ("sana", "asset", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(notebook: nbformat.NotebookNode, folder: Path, clone: Path) -> nbformat.NotebookNode:
    environment = {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return make_notebook.execute(copy.deepcopy(notebook), folder, environment | {"HF_HUB_OFFLINE": "1"})


def sheets(notebook: nbformat.NotebookNode) -> dict[str, Image.Image]:
    """Returns the picture that each cell shows, by the cell's id."""
    found = {}
    for cell in notebook["cells"]:
        shown = [one["data"]["image/jpeg"] for one in cell.get("outputs", []) if "image/jpeg" in one.get("data", {})]
        assert len(shown) <= 1
        if shown:
            found[cell["id"]] = Image.open(io.BytesIO(base64.b64decode(shown[0]))).convert("RGB")
    return found


def expected_pictures(pipeline: SanaPipeline) -> dict[str, dict[int, Image.Image]]:
    """Returns some of what each cell has to show, by place, the first and the last among them; each by its own call."""

    def make(prompt: str, seed: int, **options) -> Image.Image:
        return pipeline(prompt, seed=seed, output_type="pil", **options)[0]

    dog, cats = "a red heart and a dog on a blue background", "two cats on a green background"
    owl = make("two bananas and an owl on a white background", 7)
    frog = make("a frog and a lemon", 6)
    kept = {}

    def keep(_, step, timestep, tensors):
        kept[step + 1] = to_pil(pipeline.decode(tensors["latents"]))[0]

    last = make(dog, 3, callback_on_step_end=keep)
    weak = make(dog, 3, guidance_scale=1.0, num_inference_steps=2)
    strong = make(dog, 3, guidance_scale=8.0, num_inference_steps=20)
    return {
        "one-code": {0: make("a dog above a red heart", 0)},
        "seeds-code": {0: make("two cats", 1), 1: make("two cats", 2), 5: frog, 11: make("three green circles", 12)},
        "alone-code": {0: frog, 1: frog},
        "steps-code": {0: weak, 7: last, 11: strong},
        "sizes-code": {
            0: make(cats, 1),
            1: make(cats, 1, height=192, width=320),
            3: make(cats, 1, height=160, width=416),
        },
        "denoising-code": dict(enumerate(kept[step] for step in (1, 6, 9, 12, 14, 16, 18))) | {7: last},
        "recipe-code": {0: owl, 1: owl},
    }


def small(picture: Image.Image, side: int) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((side, side))
    return picture


def cut(sheet: Image.Image, index: int, like: Image.Image, side: int) -> Image.Image:
    """Returns the place of a sheet where a picture of this size stands, without caption and frame."""
    left, top = (index % 4) * (side + GAP) + EDGE, (index // 4) * (side + BELOW) + EDGE
    return sheet.crop((left, top, left + like.width, top + like.height))


def distance(one: Image.Image, other: Image.Image) -> float:
    """Returns how many of 256 levels two pictures are apart in the mean, where JPEG's fine noise is averaged away."""
    first, second = (np.asarray(picture.reduce(4), dtype=float) for picture in (one, other))
    return float(np.abs(first - second).mean())


def test_it_runs_offline_from_its_folder_and_shows_the_pipelines_pictures(stored, clone: Path) -> None:
    done = run(stored, clone / "asset/notebooks", clone)
    assert [problem for problem in make_notebook.problems(done) if "complains" not in problem] == []
    assert not [
        one for one in make_notebook.outputs(done) if one["output_type"] == "error" or one.get("name") == "stderr"
    ]
    shown, before = sheets(done), sheets(stored)
    expected = expected_pictures(SanaPipeline.from_pretrained(ROOT / "asset/models/sana_tiny", device="cpu"))
    assert set(shown) == set(expected) == set(before)
    for name, pictures in expected.items():
        side = 256 if name == "one-code" else SIDE
        for index, picture in pictures.items():
            picture = small(picture, side)
            place, old = (cut(one[name], index, picture, side) for one in (shown, before))
            assert np.asarray(place).std() > 10, f"{name} shows a blank picture"
            assert distance(place, picture) < LEVELS, name
            assert distance(old, place) < LEVELS, f"{name}: stored outputs are old; run tools/make_notebook.py"
    first, second = (small(expected["seeds-code"][index], SIDE) for index in (0, 1))
    assert distance(first, second) > 4 * LEVELS  # what is compared above can tell pictures apart

    text = {cell["id"]: "".join(one.get("text", "") for one in cell.get("outputs", [])) for cell in done["cells"]}
    assert "the same pixels: True" in text["alone-code"]
    assert "\n0 pixels differ" in text["recipe-code"]
    assert "allowed  8.00 GB" in text["memory-code"]
    with Image.open(clone / "output/quickstart/owl.png") as saved:
        assert saved.tobytes() == expected["recipe-code"][0].tobytes()
    recipe = json.loads(saved.text["sana"])
    assert (recipe["prompt"], recipe["seed"]) == ("two bananas and an owl on a white background", 7)
    assert recipe["made_with"]["model_path"] == "asset/models/sana_tiny"


@pytest.mark.parametrize("where", ["the clone", "elsewhere"])
def test_it_starts_in_any_folder(stored, clone: Path, tmp_path_factory, where: str) -> None:
    setup = next(cell for cell in stored["cells"] if cell["id"] == "setup")
    stored["cells"] = [setup, nbformat.v4.new_code_cell("print(Path.cwd(), Path(MODEL).is_dir())")]
    done = run(stored, clone if where == "the clone" else tmp_path_factory.mktemp("elsewhere"), clone)
    assert done["cells"][1]["outputs"][0]["text"] == f"{clone} True\n"


def test_without_the_package_it_names_the_one_line_that_installs_it(stored) -> None:
    setup = next(cell["source"] for cell in stored["cells"] if cell["id"] == "setup")
    hidden = f"import sys\nsys.modules['sana'] = None\n{setup}"
    for folder, clone in ((ROOT / "asset/notebooks", str(ROOT)), (Path("/"), "FOLDER_OF_THE_CLONE")):
        done = subprocess.run(
            [sys.executable, "-I", "-c", hidden], cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stderr.splitlines()[-1] == f"ImportError: Sana is not installed here; run: %pip install -e {clone}"


def test_what_is_stored_is_in_step_small_and_names_no_machine(stored, capsys) -> None:
    assert make_notebook.problems(stored) == []
    assert make_notebook.main(["--check"]) == 0
    assert make_notebook.QUICKSTART.stat().st_size < MAX_BYTES
    assert all(cell["outputs"] and cell["execution_count"] for cell in stored["cells"] if cell["cell_type"] == "code")
    nbformat.validate(stored)


def test_links_and_named_files_are_there(stored) -> None:
    text = "\n".join(cell["source"] for cell in stored["cells"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 4
    for link in links:
        if link.startswith("#"):
            assert f"## {link[1:].replace('-', ' ')}" in text
        else:
            assert (make_notebook.QUICKSTART.parent / link).exists(), link
    for name in re.findall(r"\b(?:asset|configs|scripts|train_scripts)/[\w./-]+", text):
        assert (ROOT / name).exists(), name


def test_a_changed_cell_a_path_a_warning_and_a_lost_picture_are_found(stored, tmp_path: Path, capsys) -> None:
    def broken(change) -> list[str]:
        notebook = copy.deepcopy(stored)
        change({cell["id"]: cell for cell in notebook["cells"]})
        return make_notebook.problems(notebook)

    assert "other cells" in broken(lambda cells: cells["title"].update(source="# Another"))[0]
    assert "shows none" in broken(lambda cells: cells["one-code"].update(outputs=[]))[0]
    message = nbformat.v4.new_output("stream", name="stdout", text="saved /home/me/x.png\n")
    assert "a path of this machine" in broken(lambda cells: cells["setup"]["outputs"].append(message))[0]
    warning = nbformat.v4.new_output("stream", name="stderr", text="a warning\n")
    assert "complains" in broken(lambda cells: cells["setup"]["outputs"].append(warning))[0]

    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise ValueError('broken cell')")])
    file = tmp_path / "failing.ipynb"
    nbformat.write(failing, file)
    before = file.read_bytes()
    assert make_notebook.main([str(file)]) == 1
    assert "broken cell" in capsys.readouterr().err
    assert file.read_bytes() == before
