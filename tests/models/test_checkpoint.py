"""`sana.models.checkpoint`: every official layout is read, and everything else is refused in one sentence."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana.models.checkpoint import CheckpointError, load_state_dict, normalise_keys, read_safetensors_metadata
from sana.models.diffusers_folder import write_transformer, write_weights
from tests.models.tiny_folder import STATE, assert_same, tiny_metadata, tiny_state


def training_checkpoint() -> dict:
    """What the official trainer saves: weights, average, optimiser and random states."""
    return {
        "state_dict": STATE,
        "state_dict_ema": {key: value + 1 for key, value in STATE.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 3,
        "rng_state": {
            "torch": torch.get_rng_state(),
            "torch_cuda": [],
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "generator": torch.Generator().get_state(),
        },
    }


# Layouts


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_gives_its_weights_or_their_average(tmp_path: Path, zipped: bool) -> None:
    torch.save(training_checkpoint(), tmp_path / "epoch_1.pth", _use_new_zipfile_serialization=zipped)
    assert_same(load_state_dict(tmp_path / "epoch_1.pth"), STATE)
    assert_same(load_state_dict(tmp_path / "epoch_1.pth", ema=True), training_checkpoint()["state_dict_ema"])


def test_flat_wrapped_and_averaged_files_are_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "flat.pt")
    assert_same(load_state_dict(tmp_path / "flat.pt"), STATE)
    torch.save({"state_dict_ema": STATE}, tmp_path / "ema.pth")
    assert_same(load_state_dict(tmp_path / "ema.pth"), STATE)
    save_file(STATE, tmp_path / "w.safetensors")
    assert_same(load_state_dict(tmp_path / "w.safetensors"), STATE)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_state_dict(tmp_path / "flat.pt", ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_stripped_from_keys(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + key: value for key, value in STATE.items()}, tmp_path / "w.pth")
    assert_same(load_state_dict(tmp_path / "w.pth"), STATE)


@pytest.mark.parametrize("place", ["pytorch_model_fsdp.bin", "model/pytorch_model_fsdp.bin"])
def test_an_fsdp_folder_is_read(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    wrapped = {key.replace("attn.", "_fsdp_wrapped_module.attn."): value for key, value in STATE.items()}
    torch.save(wrapped, tmp_path / place)
    assert_same(load_state_dict(tmp_path), STATE)
    assert_same(load_state_dict(tmp_path / place), STATE)


def test_a_released_repository_is_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": STATE}, tmp_path / "checkpoints" / "Sana.pth")
    assert_same(load_state_dict(tmp_path), STATE)
    torch.save({"state_dict": STATE}, tmp_path / "checkpoints" / "Other.pth")
    with pytest.raises(CheckpointError, match="is no model folder"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_shards_with_an_index_are_joined(tmp_path: Path, variant: str | None) -> None:
    write_weights(tmp_path, "model", STATE, variant, max_shard_bytes=20)
    assert len(list(tmp_path.glob("*-of-00002.safetensors"))) == 2
    assert_same(load_state_dict(tmp_path, variant=variant), STATE)
    write_weights(tmp_path, "model", STATE, variant)  # whole again: the shards of before are gone
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert_same(load_state_dict(tmp_path, variant=variant), STATE)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path, "model", STATE, None, max_shard_bytes=20)
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard model-00002-of-00002.safetensors, which is missing"):
        load_state_dict(tmp_path)
    index.write_text(good[:20])
    with pytest.raises(CheckpointError, match="no index of weight shards"):
        load_state_dict(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        load_state_dict(tmp_path)


def test_variants_of_a_folder(tmp_path: Path) -> None:
    half = {key: value.bfloat16() for key, value in STATE.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    assert_same(load_state_dict(tmp_path), half)  # its only variant
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same(load_state_dict(tmp_path), STATE)
    assert_same(load_state_dict(tmp_path, variant="bf16"), half)
    assert_same(load_state_dict(tmp_path, variant="fp16"), STATE)  # absent: the default, with a warning


@pytest.mark.parametrize("name", ["transformer", "."])
def test_a_diffusers_folder_comes_with_official_keys(tmp_path: Path, name: str) -> None:
    state = tiny_state()
    write_transformer(tmp_path / name, state, tiny_metadata())
    assert_same(load_state_dict(tmp_path), {key: value for key, value in state.items() if key != "pos_embed"})
    single = load_state_dict(tmp_path / name / "diffusion_pytorch_model.safetensors")
    assert set(single) == set(state) - {"pos_embed", "y_embedder.y_embedding"}


# Refusals


class Malicious:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_hostile_file_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    torch.save({"state_dict": Malicious(f"touch {mark}")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth was refused: it asks to run posix.system") as caught:
        load_state_dict(tmp_path / "evil.pth")
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, 0.95])
def test_a_truncated_pth_is_one_sentence(tmp_path: Path, zipped: bool, kept: float) -> None:
    torch.save({"state_dict": STATE}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(content[: int(len(content) * kept) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"cut.pth (is damaged or cut short|was refused)") as caught:
        load_state_dict(cut)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 40, -3])
def test_a_truncated_safetensors_is_one_sentence(tmp_path: Path, kept: int) -> None:
    save_file(STATE, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:kept])
    for read in (load_state_dict, read_safetensors_metadata):
        with pytest.raises(CheckpointError, match="cut.safetensors is damaged or cut short") as caught:
            read(cut)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dict of weights"),
        ({}, "it is empty"),
        ({"state_dict": {"a": 1}}, "a is no tensor"),
        ({"epoch": 3}, "epoch is no tensor"),
    ],
)
def test_a_file_without_weights_says_so(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "w.pth")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>" * 100)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="page.pth was refused"):
        load_state_dict(tmp_path / "page.pth")
    with pytest.raises(CheckpointError, match="no known suffix of a weight file"):
        load_state_dict(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"empty is no model folder: .*it holds nothing"):
        load_state_dict(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="twice, once as module.a"):
        normalise_keys({"a": torch.ones(1), "module.a": torch.ones(1)}, "w.pth")
