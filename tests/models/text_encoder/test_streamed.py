"""Empty networks equal loaded ones but for the weights; tensors come out of files one by one; damage is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.models import TEXT_ENCODERS
from sana.models.text_encoder.base import TextEncoderError
from sana.models.text_encoder.streamed import StoredTensors, empty_network, weight_files

SIZES = {
    "gemma": {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "hidden_size": 40},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "hidden_size": 40},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 64},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
}


@pytest.fixture(scope="module", params=list(SIZES))
def saved(request, tmp_path_factory):
    """A folder with a random network of one kind, stored in bfloat16, and the kind."""
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    kind, options = request.param, {"vocab_size": 50, **SIZES[request.param]}
    if kind != "t5":
        options |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    folder = tmp_path_factory.mktemp(kind)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_network_with_its_weights_is_the_loaded_one(saved, dtype):
    folder, kind = saved
    encoder_class = TEXT_ENCODERS[kind]
    loaded = encoder_class.load_model(folder, dtype=dtype, attn_implementation=encoder_class.attention)
    empty = empty_network(encoder_class, folder, dtype)
    assert all(one.is_meta and one.dtype == dtype for one in empty.parameters())
    assert list(empty.state_dict()) == list(loaded.state_dict())
    tables = dict(empty.named_buffers())
    assert set(tables) == set(dict(loaded.named_buffers())) and bool(tables) == (kind != "t5")
    for name, table in loaded.named_buffers():
        assert torch.equal(tables[name], table) and tables[name].dtype == table.dtype, name
    empty.load_state_dict(loaded.state_dict(), assign=True)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = loaded.eval()(input_ids=ids).last_hidden_state
        assert torch.equal(empty(input_ids=ids).last_hidden_state, expected)


def test_stored_tensors_are_those_of_the_file_without_a_head(tmp_path):
    stored = {"model.layers.0.weight": torch.randn(3), "lm_head.weight": torch.randn(2), "model.norm": torch.ones(1)}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt", "answer": "42"})
    tensors = StoredTensors(weight_files(tmp_path))
    assert set(tensors) == {"layers.0.weight", "norm"} and len(tensors) == 2 and tensors.metadata["answer"] == "42"
    assert torch.equal(tensors.pop("layers.0.weight"), stored["model.layers.0.weight"])
    assert set(tensors) == {"norm"} and tensors.pop("layers.0.weight", None) is None
    with pytest.raises(TypeError, match="not changed"):
        tensors["norm"] = torch.zeros(1)


def test_shards_are_read_together_and_missing_ones_named(tmp_path):
    parts = {"one.safetensors": {"a": torch.ones(1)}, "two.safetensors": {"b": torch.zeros(2)}}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(StoredTensors(weight_files(tmp_path))) == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(TextEncoderError, match=r"names two.safetensors, which is not there"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(TextEncoderError, match="no index of weight shards"):
        weight_files(tmp_path)


def test_other_formats_have_no_files(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert weight_files(tmp_path) == []


def test_a_cut_file_is_named(saved, tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copyfile(saved[0] / "model.safetensors", file)
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TextEncoderError, match="model.safetensors is damaged or cut short"):
        StoredTensors([file])
