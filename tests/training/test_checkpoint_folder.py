"""Only whole checkpoints are read, whatever was done to the folder, and no code in them runs."""

import json
import os

import pytest
import torch

from sana.models.checkpoint import CheckpointError
from sana.training import checkpoint_folder
from sana.training.checkpoints import Checkpoints
from tests.training.checkpoint_tools import Exploding, reindex, three_checkpoints


@pytest.fixture
def saved(tmp_path):
    return three_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    "pointer",
    [None, b"", b"step_00000900\n", b"../checkpoints/step_00000100", b"/etc", b"\xff\xfe", b"step_00000100\0"],
)
def test_a_broken_pointer_falls_back_to_the_newest(saved, caplog, pointer):
    (saved.folder / "latest").unlink()
    if pointer is not None:
        (saved.folder / "latest").write_bytes(pointer)
    assert saved.latest().name == "step_00000300"
    assert saved.load().shared["note"] == "step 300"
    assert "points to no whole checkpoint" in caplog.text


def test_the_pointer_wins_over_newer_folders(saved, caplog):
    (saved.folder / "latest").write_text("step_00000200")
    assert saved.load().step == 200
    assert not caplog.text


def damage_cut(folder):
    os.truncate(folder / "shared.pt", 200)


def damage_missing(folder):
    (folder / "rank_00000.pt").unlink()


def damage_no_index(folder):
    (folder / "checkpoint.json").unlink()


def damage_half_index(folder):
    os.truncate(folder / "checkpoint.json", 90)


def damage_flipped(folder):
    content = bytearray((folder / "shared.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "shared.pt").write_bytes(bytes(content))


def damage_escape(folder):
    index = json.loads((folder / "checkpoint.json").read_text())
    index["files"]["../latest"] = {"bytes": 14, "crc32": "0"}
    (folder / "checkpoint.json").write_text(json.dumps(index))


def damage_version(folder):
    index = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(index | {"format_version": 99}))


DAMAGES = [
    damage_cut,
    damage_missing,
    damage_no_index,
    damage_half_index,
    damage_flipped,
    damage_escape,
    damage_version,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_passed_over_and_refused_by_name(saved, caplog, damage):
    damage(saved.folder / "step_00000300")
    assert saved.load().step == 200
    assert "step_00000300" in caplog.text
    if damage is not damage_flipped:  # latest() looks at sizes only
        assert saved.latest().name == "step_00000200"
    with pytest.raises(CheckpointError, match="step_00000300"):
        saved.load(saved.folder / "step_00000300")


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(saved, tmp_path):
    for step in (100, 200, 300):
        damage_cut(saved.folder / f"step_{step:08d}")
    with pytest.raises(CheckpointError, match="3 checkpoints .* damaged; move them away"):
        saved.latest()
    empty = Checkpoints(tmp_path / "empty")
    assert empty.latest() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        empty.load()


def test_code_in_a_file_is_refused(saved, tmp_path):
    folder = saved.folder / "step_00000300"
    torch.save({"x": Exploding(tmp_path / "ran")}, folder / "shared.pt")
    reindex(folder)
    with pytest.raises(CheckpointError, match=r"shared\.pt cannot be read"):
        saved.load(folder)
    assert not (tmp_path / "ran").exists()


def test_names_of_the_layout():
    assert checkpoint_folder.folder_name(400) == "step_00000400"
    assert checkpoint_folder.step_of(checkpoint_folder.Path("step_123456789")) == 123456789
