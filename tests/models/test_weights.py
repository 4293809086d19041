"""`sana.models.weights` and `checkpoint`: every official layout, strictness, clear refusals, metadata, fp16 lineage."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sana.config import config_from_dict
from sana.models import build_transformer
from sana.models.checkpoint import extra_file
from sana.models.diffusers_folder import write_transformer, write_weights
from sana.models.metadata import FP16_REPOSITORIES, official_precision
from sana.models.weights import (
    CheckpointError,
    fp16_lineage,
    load_state_dict,
    load_weights,
    read_metadata,
    save_checkpoint,
)
from tests.models.tiny_folder import tiny_metadata, tiny_state, tiny_transformer

STATE = {"x_embedder.proj.weight": torch.arange(6.0).reshape(2, 3), "blocks.0.attn.qkv.weight": torch.ones(2)}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for key in expected:
        assert torch.equal(actual[key], expected[key]) and actual[key].dtype == expected[key].dtype, key


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
    assert read_metadata(tmp_path) is None


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
    for read in (load_state_dict, read_metadata):
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
        load_weights(nn.Linear(1, 1), {"a": torch.ones(1), "module.a": torch.ones(1)})


# Strictness


def built(**changes: object) -> nn.Module:
    """The tiny transformer with changed config fields, "section.key" written section__key."""
    config = tiny_metadata().config
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return build_transformer(config_from_dict(config))


def test_weights_arrive_in_the_model() -> None:
    model = built()
    kept = load_weights(model, tiny_state())
    assert kept == ()
    assert_same(dict(model.state_dict()), tiny_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__qk_norm": True}, r"blocks.0.attn.q_norm.weight of shape \(32,\) .*; check model.qk_norm"),
        ({"model__cross_norm": True}, r"blocks.0.cross_attn.q_norm.weight .*; check model.cross_norm"),
        (
            {"model__mlp_ratio": 4.0},
            r"inverted_conv.conv.weight is \(160, 32, 1, 1\) in the file and \(256, 32, 1, 1\)",
        ),
        ({"model__mlp_ratio": 4.0}, "check model.mlp_ratio"),
        ({"model__ffn_type": "mlp"}, "check model.ffn_type"),
        ({"model__cfg_embed": True}, "cfg_embedder.* is in the model and not in the file; check model.cfg_embed"),
        ({"vae__vae_latent_dim": 8}, r"x_embedder.proj.weight is \(32, 4, 1, 1\) in the file and \(32, 8, 1, 1\)"),
        ({"vae__vae_latent_dim": 8}, "check vae.vae_latent_dim"),
        ({"text_encoder__caption_channels": 64}, "check text_encoder.caption_channels"),
        ({"text_encoder__model_max_length": 30}, "check text_encoder.model_max_length"),
        ({"text_encoder__y_norm": False}, "is in the file and not in the model; check text_encoder.y_norm"),
        ({"scheduler__pred_sigma": True}, r"final_layer.linear.weight is \(4, 32\) .*scheduler.pred_sigma"),
        (
            {"model__extra": {"depth": 3, "hidden_size": 32, "num_heads": 4}},
            r"it has 2 blocks and the model 3; check model.model \(its depth\)",
        ),
        ({"model__extra": {"depth": 2, "hidden_size": 64, "num_heads": 4}}, r"check model.model \(its hidden size\)"),
    ],
)
def test_a_mismatch_names_key_shape_and_config_field(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(built(**changes), tiny_state())
    assert str(caught.value).startswith("The state dict does not fit SanaMS: ")
    assert "\n" not in str(caught.value)


def test_only_pos_embed_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    state = tiny_state()
    state["pos_embed"] = torch.zeros(1, 4, 32)
    model = built()
    own = model.pos_embed.clone()
    with caplog.at_level("WARNING", logger="sana"):
        assert load_weights(model, state) == ("pos_embed",)
    assert "re-initialised pos_embed" in caplog.text
    assert torch.equal(model.pos_embed, own)
    state.pop("y_embedder.y_embedding")
    with pytest.raises(CheckpointError, match="y_embedder.y_embedding"):
        load_weights(model, state)
    assert load_weights(model, state, ignorable=("pos_embed", "y_embedder.y_embedding")) == (
        "pos_embed",
        "y_embedder.y_embedding",
    )


def test_an_unrelated_file_is_told_apart() -> None:
    with pytest.raises(CheckpointError, match=r"none of its keys \(such as layer.weight\) is a key of the model"):
        load_weights(built(), {"layer.weight": torch.ones(2)})


def test_a_foreign_diffusers_folder_says_what_was_reinitialised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_transformer(tmp_path / "transformer", tiny_state(), tiny_metadata())
    extra_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model = built()
    with caplog.at_level("WARNING", logger="sana"):
        kept = load_weights(model, tmp_path)
    assert set(kept) == {"pos_embed", "y_embedder.y_embedding"}
    assert "re-initialised" in caplog.text and "y_embedder.y_embedding" in caplog.text
    rest = {key: value for key, value in tiny_state().items() if key not in kept}
    assert_same({key: value for key, value in model.state_dict().items() if key not in kept}, rest)


def test_a_model_without_storage_receives_its_own_copies(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_state()}, tmp_path / "w.pth")
    with torch.device("meta"):
        model = built()
    assert load_weights(model, tmp_path / "w.pth") == ()
    assert_same(dict(model.state_dict()), tiny_state())
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()  # memory of its own, not the file's
    assert_same(load_state_dict(tmp_path / "w.pth"), tiny_state())
    with torch.device("meta"):
        model = built()
    state = tiny_state()
    state.pop("pos_embed")
    with pytest.raises(CheckpointError, match="has no pos_embed, and the model is on the meta device"):
        load_weights(model, state)


def test_weights_are_cast_to_the_models_dtype() -> None:
    model = built().to(torch.bfloat16)
    load_weights(model, tiny_state())
    assert torch.equal(model.x_embedder.proj.weight, tiny_state()["x_embedder.proj.weight"].bfloat16())


# Our own files


def test_a_checkpoint_of_ours_says_what_it_is(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    path = save_checkpoint(tmp_path / "deep" / "model.safetensors", tiny_transformer(), metadata)
    assert read_metadata(path) == metadata
    assert read_metadata(path.parent) == metadata
    assert metadata.arch["class"] == "SanaMS" and metadata.arch["kwargs"]["depth"] == 2
    assert_same(load_state_dict(path), tiny_state())
    model = build_transformer(config_from_dict(read_metadata(path).config))
    load_weights(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]  # no temporary file left


def test_a_checkpoint_may_be_stored_in_another_dtype(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m.safetensors", tiny_state(), tiny_metadata(), dtype="bf16")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="end in .safetensors"):
        save_checkpoint(tmp_path / "m.pth", tiny_state(), tiny_metadata())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m.safetensors", STATE, tiny_metadata())
    before = path.read_bytes()
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
        save_checkpoint(path, STATE | {"broken": "no tensor"}, tiny_metadata())  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_foreign_and_broken_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    assert read_metadata(tmp_path / "foreign.safetensors") is None
    save_file(STATE, tmp_path / "later.safetensors", metadata={"sana_format": "9"})
    with pytest.raises(CheckpointError, match="metadata of version 9"):
        read_metadata(tmp_path / "later.safetensors")
    save_file(STATE, tmp_path / "broken.safetensors", metadata=tiny_metadata().to_strings() | {"arch": "[]"})
    with pytest.raises(CheckpointError, match="The metadata of .*broken.safetensors is broken"):
        read_metadata(tmp_path / "broken.safetensors")
    torch.save({"state_dict": STATE}, tmp_path / "official.pth")
    assert read_metadata(tmp_path / "official.pth") is None


# The fp16 lineage


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("hf://Efficient-Large-Model/Sana_1600M_1024px/checkpoints/Sana_1600M_1024px.pth", "fp16"),
        ("hf://Efficient-Large-Model/Sana_1600M_1024px_BF16/checkpoints/Sana_1600M_1024px_BF16.pth", "bf16"),
        ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "bf16"),
        ("Efficient-Large-Model/Sana_600M_512px_diffusers", "fp16"),
        ("Efficient-Large-Model/Sana_1600M_1024px_MultiLing@main", "fp16"),
        ("hf://Efficient-Large-Model/Sana_1600M_2Kpx_BF16", "bf16"),
        ("hf://Efficient-Large-Model/SANA1.5_4.8B_1024px/checkpoints/SANA1.5_4.8B_1024px.pth", "bf16"),
        ("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "bf16"),
        ("hf://Efficient-Large-Model/Sana_1600M_1024px_BF16_ControlNet_HED", "bf16"),
        ("/cache/hub/models--Efficient-Large-Model--Sana_600M_1024px/snapshots/abc/w.pth", "fp16"),
        ("/home/me/Sana_600M_1024px.pth", "fp16"),
        ("/home/me/my_model.pth", None),
        ("/home/me/Sana_600M_1024px_finetuned/last.pth", None),
    ],
)
def test_official_repositories_are_known(ref: str, expected: str | None) -> None:
    found = official_precision(ref)
    assert (found[0] if found else None) == expected


def test_the_lineage_is_decided_in_order_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    official = f"hf://Efficient-Large-Model/{FP16_REPOSITORIES[0]}"
    metadata = tiny_metadata()
    with caplog.at_level("INFO", logger="sana"):
        metadata.precision = "bf16"
        assert fp16_lineage(official, metadata, "fp16") == (False, f"metadata of {official}")
        metadata.precision = "fp16"
        assert fp16_lineage("m.safetensors", metadata, "bf16")[0] is True
        metadata.precision = ""
        assert fp16_lineage(official, metadata, "bf16") == (True, f"official repository {FP16_REPOSITORIES[0]}")
        assert fp16_lineage("own.pth", None, "fp16") == (True, "model.mixed_precision")
        assert fp16_lineage("own.pth", None, "bf16") == (False, "model.mixed_precision")
        assert fp16_lineage("own.pth", None, None) == (False, "model.mixed_precision")
    assert "fp16 clip on" in caplog.text and "fp16 clip off" in caplog.text
