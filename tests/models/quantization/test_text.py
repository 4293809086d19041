"""Text encoders quantised on the way in, written and read again; what stands in their files; refusals."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sana.models.checkpoint import CheckpointError
from sana.models.quantization.apply import quantization_of, quantize
from sana.models.quantization.load import Wanted
from sana.models.quantization.text import RECORD, STORED, save_text_encoder
from sana.models.text_encoder.load import load_text_encoder
from tests.parity.common import DEFAULT_FOLDER

ON_CPU = ("int8", "int8-dynamic", "nf4")
PROMPTS = ["a red circle", "two cats by the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("text")
    for source in ("tiny_gemma2", "tiny_tokenizer"):
        shutil.copytree(DEFAULT_FOLDER / "text" / source, target, dirs_exist_ok=True)
    return target


def load(folder, wanted: Wanted | None = None, dtype: torch.dtype = torch.float32):
    return load_text_encoder(folder, dtype=dtype, model_max_length=20, quantization=wanted)


def quantised(folder, scheme: str, dtype: torch.dtype = torch.float32, keep: tuple[str, ...] = ()):
    encoder = load(folder, dtype=dtype).requires_grad_(False)
    quantize(encoder, scheme, keep=keep)
    return encoder


def assert_same(one, other) -> None:
    assert quantization_of(one) == quantization_of(other) is not None
    first, second = one.model.state_dict(), other.model.state_dict()
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert torch.equal(one.encode(PROMPTS).embeds, other.encode(PROMPTS).embeds)


@pytest.mark.parametrize("scheme", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_on_the_way_in_or_afterwards_is_the_same(folder, scheme, dtype):
    keep = ("layers.0.self_attn.*",)
    assert_same(load(folder, Wanted(scheme, keep), dtype), quantised(folder, scheme, dtype, keep))


@pytest.mark.parametrize("scheme", ON_CPU)
def test_written_and_read_again(folder, scheme, tmp_path):
    encoder = quantised(folder, scheme)
    save_text_encoder(encoder, tmp_path / "out")
    assert_same(load(tmp_path / "out"), encoder)
    assert_same(load(tmp_path / "out", Wanted(scheme)), encoder)
    kinds = {one.dtype for one in load_file(tmp_path / "out" / STORED).values()}
    assert kinds == {torch.float32, torch.uint8 if scheme == "nf4" else torch.int8}  # plain tensors only


def test_weights_in_another_layout_are_loaded_as_a_whole_first(folder, tmp_path, caplog):
    other = tmp_path / "pickled"
    shutil.copytree(folder, other)
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with caplog.at_level("INFO"):
        made = load(other, Wanted("int8"))
    assert "loaded as a whole" in caplog.text
    assert_same(made, quantised(folder, "int8"))


def test_transformers_does_not_take_quantised_weights_for_its_own(folder, tmp_path):
    from transformers import AutoModel

    save_text_encoder(quantised(folder, "int8"), tmp_path)
    with pytest.raises(OSError, match="no file named"):
        AutoModel.from_pretrained(tmp_path, local_files_only=True)


def test_an_exact_encoder_is_not_written(folder, tmp_path):
    with pytest.raises(ValueError, match="not quantised"):
        save_text_encoder(load(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="int4 runs on CUDA"):
        load(folder, Wanted("int4"))
    with pytest.raises(ValueError, match="keep: no layer of the text encoder"):
        load(folder, Wanted("int8", ("layers.9.*",)))
    save_text_encoder(quantised(folder, "int8"), tmp_path)
    with pytest.raises(CheckpointError, match="holds int8 weights, and quantize"):
        load(tmp_path, Wanted("nf4"))
    file = tmp_path / STORED
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        strings = opened.metadata()
    for record in ({}, {RECORD: "x"}, {RECORD: "[]"}):
        save_file(tensors, file, {"format": "pt", **record})
        with pytest.raises(CheckpointError, match="does not say how it is quantised"):
            load(tmp_path)
    key = next(key for key in tensors if key.endswith("int8_values"))
    save_file({**tensors, key: tensors[key].float()}, file, strings)
    with pytest.raises(CheckpointError, match=r"damaged: .*int8_values is torch.float32"):
        load(tmp_path)
    assert json.loads(strings[RECORD])["scheme"] == "int8"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(tmp_path)
