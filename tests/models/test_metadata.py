"""`sana.models.metadata`: what our checkpoints say about themselves, how they are written, and the fp16 lineage."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.config import config_from_dict
from sana.models import build_transformer
from sana.models.metadata import FP16_REPOSITORIES, fp16_lineage, official_precision, save_checkpoint
from sana.models.weights import CheckpointError, load_state_dict, load_weights, read_metadata
from tests.models.tiny_folder import STATE, assert_same, tiny_metadata, tiny_state, tiny_transformer

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


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    files = [save_checkpoint(tmp_path / f"{n}.safetensors", tiny_state(), tiny_metadata()) for n in range(4)]
    assert len({file.read_bytes() for file in files}) == 1
    assert_same(load_file(files[0]), tiny_state())


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
