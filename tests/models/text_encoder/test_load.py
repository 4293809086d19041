"""Finding and loading: families against transformers itself, faults as one sentence, nothing large before a check."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GemmaModel,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from sana.models import TEXT_ENCODERS
from sana.models.text_encoder import TextEncoderError, load, load_text_encoder, require_text_encoder
from sana.models.text_encoder.load import OFFICIAL_ENCODERS, find_text_encoder
from sana.registry import UnknownNameError
from sana.utils import hub
from tests.parity.common import DEFAULT_FOLDER
from tests.utils.hub_server import Hub, ask, running

TEXT = DEFAULT_FOLDER / "text"
SMALL = {"vocab_size": 656, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def copy_tokenizer(folder: Path) -> None:
    for file in (TEXT / "tiny_tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recorded tiny Gemma-2 with its tokenizer in one folder, writable."""
    for file in (TEXT / "tiny_gemma2").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    copy_tokenizer(tmp_path)
    return tmp_path


def make(kind: str) -> torch.nn.Module:
    if kind == "gemma":
        return GemmaModel(GemmaConfig(**SMALL, **HEADS))
    if kind == "qwen2":
        return Qwen2Model(Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, **HEADS))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 656}
    return T5ForConditionalGeneration(T5Config(**sizes))  # the published T5 folders hold the decoder as well


@pytest.mark.parametrize("kind", ["gemma", "qwen2", "t5"])
def test_every_family_gives_what_transformers_gives(kind: str, tmp_path: Path) -> None:
    make(kind).eval().save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    encoder = load_text_encoder(tmp_path, model_max_length=9)
    assert type(encoder) is TEXT_ENCODERS[kind] and encoder.hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["a red cat", ""], padding="max_length", padding_side="right", max_length=9, return_tensors="pt")
    batch.pop("token_type_ids", None)
    classes = {"gemma": GemmaModel, "qwen2": Qwen2Model, "t5": T5EncoderModel}
    reference = classes[kind].from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = reference(**batch).last_hidden_state
    encoded = encoder.encode(["a red cat", ""])
    torch.testing.assert_close(encoded.embeds, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoded.mask, batch["attention_mask"])


def test_t5_follows_no_instruction_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("t5").save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    instructed = load_text_encoder(tmp_path, model_max_length=9, chi_prompt=["Enhance:"])
    assert "chi_prompt has no effect" in caplog.text
    plain = load_text_encoder(tmp_path, model_max_length=9)
    assert torch.equal(instructed.encode(["a cat"]).embeds, plain.encode(["a cat"]).embeds)


def test_dtype_is_taken(folder: Path) -> None:
    encoder = load_text_encoder(folder, dtype=torch.bfloat16, model_max_length=8)
    assert encoder.dtype == encoder.encode(["a cat"]).embeds.dtype == torch.bfloat16


def test_the_layout_of_diffusers_is_found(tmp_path: Path) -> None:
    shutil.copytree(TEXT / "tiny_gemma2", tmp_path / "text_encoder")
    shutil.copytree(TEXT / "tiny_tokenizer", tmp_path / "tokenizer")
    one = load_text_encoder(tmp_path, model_max_length=8).encode(["a cat"]).embeds
    assert torch.equal(one, load_text_encoder(tmp_path / "text_encoder", model_max_length=8).encode(["a cat"]).embeds)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "is no text encoder folder: it has no config.json"),
        ("config.json", "{", "is no model config"),
        ("config.json", "[]", "is no model config"),
        ("config.json", '{"model_type": "clip"}', "known text encoders are gemma, gemma2, qwen2, t5"),
        ("model.safetensors", "rubbish", "cannot be loaded"),
        ("model.safetensors", None, "cannot be loaded"),
        ("tokenizer.json", "rubbish", "The tokenizer in"),
    ],
)
def test_a_damaged_folder_is_one_sentence_with_its_name(
    folder: Path, file: str, content: str | None, message: str
) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(TextEncoderError, match=message) as caught:
        load_text_encoder(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'gemma-2-2b-it'"):
        load_text_encoder("gemma-2-2b-itt")
    with pytest.raises(TextEncoderError, match="does not exist"):
        require_text_encoder("none.safetensors")


@pytest.mark.parametrize("name", list(OFFICIAL_ENCODERS))
def test_official_names_ask_for_their_repository(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(ref: str, **options: object) -> Path:
        asked.append((ref, options))
        return Path("found")

    monkeypatch.setattr(load.hub, "resolve", resolve)
    assert find_text_encoder(name) == Path("found")
    assert [ref for ref, _ in asked] == [f"hf://{OFFICIAL_ENCODERS[name].hub_id}"] * 2
    assert asked[0][1]["allow_patterns"] == ["config.json"]
    weights = [pattern for pattern in asked[1][1]["allow_patterns"] if pattern in ("*.safetensors", "*.bin")]
    assert len(weights) == 1 and "*" not in asked[1][1]["allow_patterns"]


def test_a_folder_inside_a_repository_fetches_nothing_else_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []
    monkeypatch.setattr(load.hub, "resolve", lambda ref, **options: patterns.extend(options["allow_patterns"]))
    find_text_encoder("hf://owner/pipeline/text_encoder")
    assert {pattern.partition("/")[0] for pattern in patterns} == {"text_encoder", "tokenizer"}


@pytest.mark.parametrize(("name", "gated"), [("gemma-2-2b", True), ("gemma-2-2b-it", False), ("owner/encoder", False)])
def test_a_model_that_cannot_be_had_is_reported_before_any_weights_are_asked_for(
    name: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(ref: str, **options: object) -> Path:
        asked.append(options["allow_patterns"])
        raise hub.FetchError(f"Could not fetch {ref}: nobody there.")

    monkeypatch.setattr(load.hub, "resolve", resolve)
    with pytest.raises(TextEncoderError, match=f"'{name}'.*nobody there.*local folder.*save_prompt_embeds") as caught:
        load_text_encoder(name)
    assert asked == [["config.json"]]
    assert ("It is gated: accept its terms" in str(caught.value)) == gated


def test_the_check_is_refused_by_a_gated_repository(tmp_path: Path) -> None:
    """With the real hub client: the question that require_text_encoder asks, and no request for the weights."""
    files = {"config.json": json.dumps({"model_type": "gemma2"}).encode(), "model.safetensors": bytes(4096)}
    with running(Hub(repos={"google/gemma-2-2b": files}, gated={"google/gemma-2-2b"})) as server:
        task = {"ref": "hf://google/gemma-2-2b", "kind": "folder", "allow_patterns": ["config.json"]}
        (refused,) = ask(server, tmp_path, task)
        assert "the repository is gated" in refused["error"]
        assert not [path for _, path, _ in server.log if path.endswith(".safetensors")]
