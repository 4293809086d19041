"""Embeddings in a file: the same numbers as the encoder's, and clear refusals of what the file cannot answer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana.models.text_encoder import (
    CHI_PROMPT,
    PrecomputedTextEncoder,
    TextEncoderError,
    load_prompt_embeds,
    load_text_encoder,
    save_prompt_embeds,
)
from tests.parity.common import DEFAULT_FOLDER

TEXT = DEFAULT_FOLDER / "text"
PROMPTS = ["a cat", "雪山日出 🚀 e\u0301", "", 'say "hi"\nthere']


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(
        TEXT / "tiny_gemma2", tokenizer_path=TEXT / "tiny_tokenizer", model_max_length=12, chi_prompt=CHI_PROMPT
    )


@pytest.fixture
def file(encoder, tmp_path: Path) -> Path:
    save_prompt_embeds(tmp_path / "猫.safetensors", [*PROMPTS, "a cat"], encoder, negative_prompts=["", "blurry"])
    return tmp_path / "猫.safetensors"


def test_the_file_answers_as_the_encoder_does(encoder, file: Path) -> None:
    stored = load_text_encoder(file, model_max_length=12, chi_prompt=CHI_PROMPT)
    assert isinstance(stored, PrecomputedTextEncoder)
    assert stored.prompts == PROMPTS and stored.hidden_size == encoder.hidden_size
    for ours, theirs in (
        (stored.encode(PROMPTS[::-1]), encoder.encode(PROMPTS[::-1])),
        (stored.encode_null(), encoder.encode_null()),
        (stored.encode_null(["blurry", ""]), encoder.encode_null(["blurry", ""])),
    ):
        assert torch.equal(ours.embeds, theirs.embeds) and torch.equal(ours.mask, theirs.mask)


def test_trimmed_answers_are_those_of_the_encoder(encoder, file: Path) -> None:
    stored = load_prompt_embeds(file)
    for prompts in (["a cat", ""], PROMPTS):
        ours, theirs = (one.encode(prompts, trim=True) for one in (stored, encoder))
        assert torch.equal(ours.embeds, theirs.embeds) and torch.equal(ours.mask, theirs.mask)


def test_the_fingerprint_follows_what_decides_the_embeddings(file: Path) -> None:
    stored = load_prompt_embeds(file)
    before = stored.fingerprint()
    assert before == stored.fingerprint() != stored.to(dtype=torch.bfloat16).fingerprint()


def test_a_prompt_that_is_not_there_is_named(file: Path) -> None:
    stored = load_prompt_embeds(file)
    with pytest.raises(TextEncoderError, match="The prompt 'a dog' is not among the 4 of .*猫.safetensors"):
        stored.encode(["a cat", "a dog"])
    with pytest.raises(TextEncoderError, match="The negative prompt 'a cat' is not among the 2"):
        stored.encode_null(["a cat"])


def test_other_settings_are_refused(file: Path) -> None:
    with pytest.raises(TextEncoderError, match="holds 12 tokens a prompt; text_encoder.model_max_length is 300"):
        load_text_encoder(file, chi_prompt=CHI_PROMPT)
    with pytest.raises(TextEncoderError, match="was made with the instruction"):
        load_text_encoder(file, model_max_length=12)


def test_dtype_and_device_follow(file: Path) -> None:
    stored = load_prompt_embeds(file, dtype=torch.bfloat16)
    assert stored.dtype == stored.encode(["a cat"]).embeds.dtype == torch.bfloat16
    assert stored.to(dtype=torch.float32).encode(["a cat"]).embeds.dtype == torch.float32
    assert stored.to("cpu", torch.float16).dtype == torch.float16
    assert len(stored.state_dict()) == 6


def test_damaged_and_foreign_files_are_one_sentence(file: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:200])
    for name, message in (
        ("other", "is no file of prompt embeddings"),
        ("cut", "cannot be read"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(TextEncoderError, match=message) as caught:
            load_prompt_embeds(tmp_path / f"{name}.safetensors")
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_write_leaves_nothing(encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_prompt_embeds(tmp_path / "x.safetensors", ["a"], encoder)
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_are_refused(encoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="At least one prompt"):
        save_prompt_embeds(tmp_path / "x.safetensors", [], encoder)
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        save_prompt_embeds(tmp_path / "x.pt", ["a"], encoder)
    with pytest.raises(TextEncoderError, match="holds no embeddings"):
        PrecomputedTextEncoder({}, {}, source="x")
