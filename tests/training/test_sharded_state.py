"""Shards are read back in place, on any number of processes, and no code in them runs."""

import json
import pickle
import shutil

import pytest
import torch

from sana.models.checkpoint import CheckpointError
from sana.training import sharded_state
from sana.training.checkpoints import Checkpoints
from tests.training.checkpoint_tools import Exploding, program, reindex


def test_shards_of_one_process_in_place(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, sharded={"model": {"w": torch.arange(6.0)}, "optimizer": {"groups": [{"lr": 0.1, "b": (1, 2)}]}})
    target = {"model": {"w": torch.zeros(6)}, "optimizer": {"groups": [{"lr": 0.0, "b": None}]}}
    weights = target["model"]["w"]
    store.load_sharded(store.latest(), target)
    assert weights.tolist() == [0, 1, 2, 3, 4, 5] and target["optimizer"]["groups"] == [{"lr": 0.1, "b": (1, 2)}]
    for wrong in ({"model": {"w": torch.zeros(5)}}, {"model": {"other": torch.zeros(6)}}):
        with pytest.raises(CheckpointError, match="sharded cannot be loaded: "):
            store.load_sharded(store.latest(), wrong)
    store.save(2)
    with pytest.raises(CheckpointError, match="saved without FSDP"):
        store.load_sharded(store.latest(), target)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_code_in_shards_is_refused(tmp_path, name):
    store = Checkpoints(tmp_path / "run")
    store.save(1, sharded={"lr": [0.1]})
    folder = store.latest()
    if name == ".metadata":
        (folder / "sharded" / name).write_bytes(pickle.dumps(Exploding(tmp_path / "ran")))
    else:  # the table says where in the file the value is
        shutil.rmtree(folder / "sharded")
        sharded_state.dcp.save({"lr": [Exploding(tmp_path / "ran")]}, checkpoint_id=folder / "sharded", no_dist=True)
    reindex(folder)
    with pytest.raises(CheckpointError, match="mkdir"):
        store.load_sharded(folder, {"lr": [0.0]})
    assert not (tmp_path / "ran").exists()


def test_shards_of_two_processes_load_on_two_and_on_one(tmp_path):
    done = program("sharded_processes", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"result_{rank}.json").read_text())
        assert result["equal"] and result["per_rank"] == {"rank": rank}
        assert result["all_ranks"] == [{"rank": 0}, {"rank": 1}]
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "rank_00001.pt"} <= set(result["files"])
        assert "__1_0.distcp changed" in result["damage"]
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    alone = Checkpoints(tmp_path / "run")
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}
    alone.load_sharded(alone.latest(), target)
    assert all(torch.equal(target["model"][name], expected[name]) for name in expected)
    assert alone.load().per_rank is None and alone.load().shared == {"step": 7}
