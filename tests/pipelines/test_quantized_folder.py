"""Model folders with quantised weights: what stands in them, that loading is direct, and that they appear whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sana.models.checkpoint import CheckpointError
from sana.models.quantization.apply import quantization_of
from sana.models.quantization.linear import QuantizedLinear
from sana.models.quantization.text import STORED
from sana.pipelines import loading, quantized_folder
from sana.pipelines.quantized_folder import save_quantized
from sana.pipelines.sana_pipeline import SanaPipeline

CALL = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2, "progress_bar": False, "output_type": "pt"}


def make(model_folder: Path, target: Path, transformer: str | None = "int8", text: str | None = None) -> SanaPipeline:
    """Writes a quantised copy of a model; returns the pipeline that was written."""
    pipeline = SanaPipeline.from_pretrained(model_folder, device="cpu")
    pipeline.quantize(transformer, text)
    _ = pipeline.text_encoder
    save_quantized(pipeline, loading.find_model(model_folder), target)
    return pipeline


@pytest.mark.parametrize(
    ("transformer", "text"), [("int8", None), ("int8-dynamic", "nf4"), ("nf4", "int8"), (None, "int8")]
)
def test_a_written_pipeline_is_loaded_as_it_was(model_folder, tmp_path, monkeypatch, transformer, text):
    written = make(model_folder, tmp_path / "out", transformer, text)
    monkeypatch.setattr(QuantizedLinear, "from_weight", lambda *_: pytest.fail("exact weights were made"))
    loaded = SanaPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert loaded.weights_hash() == written.weights_hash()
    assert torch.equal(loaded(**CALL), written(**CALL))
    for network, other in ((loaded.transformer, written.transformer), (loaded.text_encoder, written.text_encoder)):
        assert quantization_of(network) == quantization_of(other)


def test_what_stands_in_the_folder(model_folder, tmp_path):
    source = shutil.copytree(model_folder, tmp_path / "source")
    (source / "README.md").write_text("whose weights these are")
    pipeline = make(source, tmp_path / "out", "nf4", "int8")
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"model.safetensors", "README.md", f"text_encoder/{STORED}", "vae/config.json"} <= names
    assert "text_encoder/model.safetensors" not in names and not any(name.endswith((".bin", ".pth")) for name in names)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["quantization"])
        keys = set(file.keys())
    assert record == {"scheme": "nf4", "layers": list(quantization_of(pipeline.transformer).layers), "keep": []}
    assert keys == set(pipeline.transformer.state_dict())
    config = json.loads(loading.find_model(tmp_path / "out").metadata.to_strings()["config"])
    assert (config["vae"]["vae_pretrained"], config["text_encoder"]["text_encoder_name"]) == ("vae", "text_encoder")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < (model_folder / "model.safetensors").stat().st_size


def test_the_same_request_is_granted_and_another_refused(model_folder, tmp_path):
    make(model_folder, tmp_path / "out", "int8", "int8")
    config = loading.source_config(loading.find_model(tmp_path / "out"))
    asked = SanaPipeline(config, device="cpu").quantize("int8", "int8").from_pretrained(tmp_path / "out")
    assert quantization_of(asked.text_encoder).scheme == "int8"
    with pytest.raises(CheckpointError, match="holds int8 weights, and quantize.. asked for nf4"):
        SanaPipeline(config, device="cpu").quantize("nf4").from_pretrained(tmp_path / "out")
    other = SanaPipeline(config, device="cpu").quantize(None, "int8-dynamic").from_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds int8 weights, and quantize.. asked for int8-dynamic"):
        _ = other.text_encoder
    with pytest.raises(ValueError, match="quantised to int8 already"):
        SanaPipeline.from_pretrained(tmp_path / "out", device="cpu").quantize("int8")


def test_an_interrupted_write_leaves_nothing(model_folder, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(quantized_folder, "save_checkpoint", fail)
    with pytest.raises(OSError, match="the disk is full"):
        make(model_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refusals(model_folder, tmp_path):
    pipeline, source = SanaPipeline.from_pretrained(model_folder, device="cpu"), loading.find_model(model_folder)
    with pytest.raises(ValueError, match="Nothing of the pipeline is quantised"):
        save_quantized(pipeline, source, tmp_path / "out")
    pipeline.quantize("int8")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save_quantized(pipeline, source, tmp_path / "there")
    assert not (tmp_path / "out").exists()


def test_parts_that_are_elsewhere_stay_named(model_folder, tmp_path):
    pipeline = SanaPipeline.from_pretrained(model_folder, device="cpu").quantize("int8")
    _ = pipeline.autoencoder
    pipeline.config.vae.vae_pretrained = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    save_quantized(pipeline, loading.find_model(model_folder), tmp_path / "out")
    config = loading.find_model(tmp_path / "out").metadata.config
    assert config["vae"]["vae_pretrained"] == "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    assert not (tmp_path / "out" / "vae").exists()


def test_official_weights_say_what_they_are_afterwards(model_folder, tmp_path):
    exact = SanaPipeline.from_pretrained(model_folder, device="cpu")
    torch.save({"state_dict": exact.transformer.state_dict()}, tmp_path / "official.pth")
    config = loading.source_config(loading.find_model(model_folder))
    pipeline = SanaPipeline(config, device="cpu").quantize("int8").from_pretrained(tmp_path / "official.pth")
    save_quantized(pipeline, loading.find_model(tmp_path / "official.pth"), tmp_path / "out")
    loaded = SanaPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert torch.equal(loaded(**CALL), pipeline(**CALL))
    assert loading.find_model(tmp_path / "out").metadata.arch["class"] == type(exact.transformer).__name__
