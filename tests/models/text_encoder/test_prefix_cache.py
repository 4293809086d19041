"""The cached instruction: the same embeddings as computed whole, fewer tokens computed, never stale, never changed."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from sana.models.text_encoder import PromptEmbeds, TextEncoder, base
from sana.models.text_encoder.prefix_cache import MIN_TOKENS, compute_prefix, supports_prefix
from tests.models.text_encoder.encoders import CHI, KINDS, PROMPTS, random_encoder, recorded_columns, whole

SPECIAL = ["<bos> $A", "<bos> $A <eos>", "$A"]


def chi_length(encoder: TextEncoder) -> int:
    return len(encoder.tokenizer(encoder.chi_prompt)["input_ids"])


def prompt_length(encoder: TextEncoder, prompt: str) -> int:
    return len(encoder.tokenizer(encoder.chi_prompt + prompt)["input_ids"])


def shared_length(encoder: TextEncoder, prompt: str) -> int:
    """Tokens that instruction and prompt have in common, counted one by one."""
    pairs = zip(*(encoder.tokenizer(encoder.chi_prompt + text)["input_ids"] for text in ("", prompt)), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def new_length(encoder: TextEncoder, prompt: str) -> int:
    return prompt_length(encoder, prompt) - shared_length(encoder, prompt)


def assert_real_tokens_equal(actual: PromptEmbeds, expected: PromptEmbeds) -> None:
    length = actual.mask.shape[1]
    assert torch.equal(actual.mask, expected.mask[:, :length]) and not expected.mask[:, length:].any()
    real = actual.mask.bool()
    torch.testing.assert_close(actual.embeds[real], expected.embeds[:, :length][real], rtol=1e-5, atol=1e-5)
    assert (actual.embeds[~real] == 0).all()


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_trimmed_prompts_equal_the_whole_computation(kind: str, special: str) -> None:
    encoder = random_encoder(kind, special=special)
    expected = whole(encoder, PROMPTS)
    assert_real_tokens_equal(encoder.encode(PROMPTS, trim=True), expected)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt], trim=True)
        assert_real_tokens_equal(alone, PromptEmbeds(expected.embeds[row : row + 1], expected.mask[row : row + 1]))
        assert alone.mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_full_length_padding_is_what_the_whole_computation_gives(kind: str) -> None:
    encoder = random_encoder(kind)
    full, expected = encoder.encode(PROMPTS), whole(encoder, PROMPTS)
    assert torch.equal(full.mask, expected.mask)
    torch.testing.assert_close(full.embeds, expected.embeds, rtol=1e-5, atol=1e-5)
    trimmed = encoder.encode(PROMPTS, trim=True)
    real = trimmed.mask.bool()
    assert torch.equal(trimmed.embeds[real], full.embeds[:, : trimmed.mask.shape[1]][real])  # bit for bit


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_encoded_together_equal_the_whole_computation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_encoder(kind)
    monkeypatch.setattr(encoder, "_rows_at_once", lambda count: count)  # as on CUDA
    with recorded_columns(encoder) as calls:
        together = encoder.encode(PROMPTS, trim=True)
    shared = min(shared_length(encoder, prompt) for prompt in PROMPTS)
    longest = max(prompt_length(encoder, prompt) for prompt in PROMPTS)
    assert calls == [(1, chi_length(encoder)), (len(PROMPTS), longest - shared)]
    assert_real_tokens_equal(together, whole(encoder, PROMPTS))
    full, expected = encoder.encode(PROMPTS), whole(encoder, PROMPTS)
    torch.testing.assert_close(full.embeds, expected.embeds, rtol=1e-5, atol=1e-5)


def test_only_new_tokens_reach_the_network() -> None:
    encoder = random_encoder()
    new = [new_length(encoder, prompt) for prompt in PROMPTS]
    assert new[1] == 0 < new[0] < 8 < new[2] < encoder.model_max_length
    with recorded_columns(encoder) as calls:
        encoder.encode(PROMPTS, trim=True)
        assert calls == [(1, chi_length(encoder)), *((1, count) for count in new if count)]
        calls.clear()
        encoder.encode(["a cat"], trim=True)
        assert calls == [(1, new_length(encoder, "a cat"))]
        calls.clear()
        encoder.encode_null()
        assert calls == [(1, encoder.model_max_length)]


def test_first_and_later_uses_have_the_same_bits() -> None:
    encoder = random_encoder()
    first = [encoder.encode([prompt], trim=True).embeds for prompt in PROMPTS]
    again = [encoder.encode([prompt], trim=True).embeds for prompt in reversed(PROMPTS)]
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one, other)
    together = encoder.encode(PROMPTS, trim=True)
    for row, one in enumerate(first):
        assert torch.equal(together.embeds[row, : one.shape[1]], one[0])


def test_use_does_not_change_the_prefix() -> None:
    encoder = random_encoder()
    ids = encoder.tokenizer(encoder.chi_prompt, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        prefix = compute_prefix(encoder.model, ids, encoder.device)
    before = [tensor.clone() for pair in prefix.layers for tensor in pair]
    cache = prefix.as_cache(2, len(ids))
    for layer in cache.layers:
        layer.keys.fill_(7.0)
        layer.values.fill_(7.0)
    after = [tensor for pair in prefix.layers for tensor in pair]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_merges_across_the_boundary(kind: str) -> None:
    encoder = random_encoder(kind, chi=[*CHI, "a wh"])
    assert 0 < shared_length(encoder, "ite cat") < chi_length(encoder)
    with recorded_columns(encoder) as calls:
        encoded = encoder.encode(["ite cat"], trim=True)
    assert calls == [(1, chi_length(encoder)), (1, new_length(encoder, "ite cat"))]
    assert_real_tokens_equal(encoded, whole(encoder, ["ite cat"]))


def test_an_instruction_that_shares_no_token_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MIN_TOKENS", 1)
    encoder = random_encoder(special="$A", chi=["hous"])
    assert shared_length(encoder, "e") == 0
    with recorded_columns(encoder) as calls:
        encoded = encoder.encode(["e"], trim=True)
    assert calls == [(1, chi_length(encoder)), (1, prompt_length(encoder, "e"))]
    assert_real_tokens_equal(encoded, whole(encoder, ["e"]))


def test_a_short_instruction_gets_no_call_of_its_own() -> None:
    encoder = random_encoder(chi=["Enhance: "])
    assert 1 < chi_length(encoder) < MIN_TOKENS
    with recorded_columns(encoder) as calls:
        trimmed = encoder.encode(["a cat"], trim=True)
        assert calls == [(1, prompt_length(encoder, "a cat"))]
        full = encoder.encode(["a cat"])
    assert_real_tokens_equal(trimmed, whole(encoder, ["a cat"]))
    torch.testing.assert_close(full.embeds, whole(encoder, ["a cat"]).embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(full.embeds[:, : trimmed.mask.shape[1]], trimmed.embeds)  # bit for bit


@pytest.mark.parametrize("special", SPECIAL)
def test_an_empty_prompt_computes_nothing(special: str) -> None:
    encoder = random_encoder(special=special)
    encoder.encode(["a cat"], trim=True)
    with recorded_columns(encoder) as calls:
        encoded = encoder.encode([""], trim=True)
    assert calls == []
    assert_real_tokens_equal(encoded, whole(encoder, [""]))


def test_a_prompt_beyond_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    encoder = random_encoder()
    prompt = "a house on a mat " * 20
    encoded = encoder.encode([prompt, "a cat"], trim=True)
    assert caplog.text.count("longer than text_encoder.model_max_length=40") == 1
    assert encoded.mask.sum(dim=1)[0] == 40
    assert_real_tokens_equal(encoded, whole(encoder, [prompt, "a cat"]))


@pytest.mark.parametrize("kind", ["gemma2", "qwen2"])
def test_a_window_shorter_than_the_prompt_computes_everything(kind: str) -> None:
    window = {"use_sliding_window": True, "max_window_layers": 1} if kind == "qwen2" else {}
    encoder = random_encoder(kind, sliding_window=8, **window)
    assert "sliding_attention" in encoder.model.config.layer_types
    assert chi_length(encoder) > 8
    with recorded_columns(encoder) as calls:
        encoded = encoder.encode(["a red cat"], trim=True)
    assert calls == [(1, prompt_length(encoder, "a red cat"))]
    expected = whole(encoder, ["a red cat"])
    assert_real_tokens_equal(encoded, expected)
    unlimited = random_encoder(kind)
    assert not torch.allclose(whole(unlimited, ["a red cat"]).embeds, expected.embeds, atol=1e-2)


def test_where_a_prefix_serves() -> None:
    config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    assert supports_prefix(config, 16) and not supports_prefix(config, 17)
    assert not supports_prefix(SimpleNamespace(use_bidirectional_attention=True), 4)


def test_new_weights_and_settings_are_noticed() -> None:
    encoder, other = random_encoder(), random_encoder()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    before = encoder.encode(["a cat"], trim=True).embeds
    encoder.model.load_state_dict(other.model.state_dict())
    expected = other.encode(["a cat"], trim=True).embeds
    assert torch.equal(encoder.encode(["a cat"], trim=True).embeds, expected) and not torch.equal(before, expected)
    encoder.chi_prompt = other.chi_prompt = CHI[0]
    assert_real_tokens_equal(encoder.encode(["a cat"], trim=True), whole(other, ["a cat"]))


def test_a_change_of_dtype_computes_the_instruction_again() -> None:
    encoder, fresh = random_encoder(), random_encoder().to(torch.bfloat16)
    encoder.encode(["a cat"], trim=True)
    rounded = encoder.to(torch.bfloat16).encode(["a cat"], trim=True).embeds
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, fresh.encode(["a cat"], trim=True).embeds)
    back = encoder.to(torch.float32).encode(["a cat"], trim=True).embeds
    assert torch.equal(back, fresh.to(torch.float32).encode(["a cat"], trim=True).embeds)


def test_autocast_has_an_instruction_of_its_own() -> None:
    encoder, fresh = random_encoder(), random_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        encoder.encode(["a cat"], trim=True)
    assert torch.equal(encoder.encode(["a cat"], trim=True).embeds, fresh.encode(["a cat"], trim=True).embeds)


def test_what_inference_mode_cached_serves_outside_of_it() -> None:
    encoder = random_encoder()
    with torch.inference_mode():
        first = encoder.encode(["a cat"], trim=True).embeds.clone()
    again = encoder.encode(["a cat"], trim=True).embeds
    assert torch.equal(first, again) and not again.is_inference()


def test_an_encoder_that_learns_keeps_nothing() -> None:
    encoder = random_encoder().requires_grad_(True)
    assert encoder.fingerprint() is None
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)  # changes weights and no version counter
    encoder.encode(["a cat"], trim=True)
    encoder.model(input_ids=torch.arange(4)[None]).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert_real_tokens_equal(encoder.encode(["a cat"], trim=True), whole(encoder, ["a cat"]))
    with recorded_columns(encoder) as calls:
        encoder.encode(["a cat", "a mat"], trim=True)
    assert [columns for _, columns in calls].count(chi_length(encoder)) == 1  # once a call


def test_a_network_in_training_mode_is_called_once() -> None:
    encoder = random_encoder().train()  # checkpointed layers take no cache there
    with recorded_columns(encoder) as calls:
        encoder.encode(["a cat"], trim=True)
    assert calls == [(1, prompt_length(encoder, "a cat"))]


def test_the_instruction_is_no_weight() -> None:
    encoder = random_encoder()
    names = set(encoder.state_dict())
    encoder.encode(["a cat"], trim=True)
    assert set(encoder.state_dict()) == names
    assert encoder.fingerprint() == encoder.fingerprint() != random_encoder().fingerprint()
