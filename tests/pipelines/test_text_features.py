"""What a pipeline remembers of texts: how often its encoder is asked, what is forgotten when, and the same pictures."""

from pathlib import Path

import pytest
import torch

from sana.models.text_encoder import PromptEmbeds, TextEncoder, load_text_encoder, save_prompt_embeds, tokenize_prompts
from sana.pipelines.denoise import NonFiniteError
from sana.pipelines.sana_pipeline import SanaPipeline
from sana.pipelines.text_features import CUDA_LENGTHS, TextFeatures, call_length, stack, trim_given
from tests.tiny_model import CHI_PROMPT

SHORT = {"num_inference_steps": 2, "progress_bar": False}
CPU = torch.device("cpu")
LONG = "two dogs in snow"


class Spelling:
    """An encoder that turns a text into one number a letter, and remembers what it was asked."""

    model_max_length = 8

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.settings: object = "first"
        self.value = 1.0

    def fingerprint(self) -> tuple[object, ...] | None:
        return None if self.settings is None else (self.settings,)

    def encode(self, prompts: list[str], *, chi: bool = True, trim: bool = False) -> PromptEmbeds:
        self.asked += [(prompt, not chi) for prompt in prompts]
        lengths = [max(1, min(len(prompt), self.model_max_length)) for prompt in prompts]
        total = max(lengths) if trim else self.model_max_length
        embeds, mask = torch.zeros(len(prompts), total, 2), torch.zeros(len(prompts), total, dtype=torch.long)
        for row, length in enumerate(lengths):
            embeds[row] = self.value * (row + 10 * len(self.asked))
            mask[row, :length] = 1
        return PromptEmbeds(embeds, mask)

    def encode_null(self, negative_prompts: list[str]) -> PromptEmbeds:
        return self.encode(negative_prompts, chi=False)


@pytest.fixture
def encoder() -> Spelling:
    return Spelling()


def test_a_text_is_encoded_once_and_prompts_are_not_negative_prompts(encoder: Spelling) -> None:
    features = TextFeatures()
    first = features.find(encoder, ["cat", "dog", "cat"], device=CPU)
    again = features.find(encoder, ["dog", "owl", "cat"], device=CPU)
    features.find(encoder, ["cat", ""], null=True, device=CPU)
    features.find(encoder, ["", "cat"], null=True, device=CPU)
    assert encoder.asked == [("cat", False), ("dog", False), ("owl", False), ("cat", True), ("", True)]
    assert first[0] is first[2] is again[2] and first[1] is again[0]


def test_prompts_are_kept_short_and_negative_prompts_whole(encoder: Spelling) -> None:
    features = TextFeatures()
    prompts = features.find(encoder, ["cat", "horses"], device=CPU)
    negatives = features.find(encoder, ["", "cat"], null=True, device=CPU)
    assert [len(one.mask) for one in prompts] == [len(one.embeds) for one in prompts] == [3, 6]
    assert [len(one.embeds) for one in negatives] == [8, 8]
    assert [int(one.mask.sum()) for one in negatives] == [1, 3]
    assert (negatives[0].embeds[1:] != 0).all()  # padding rows of a null caption are read
    assert prompts[0].embeds.untyped_storage().nbytes() == 3 * 2 * 4  # no view keeps the whole batch


def test_the_least_recently_used_go_first_and_the_null_caption_stays(encoder: Spelling) -> None:
    features = TextFeatures(size=2)
    features.find(encoder, [""], null=True, device=CPU)
    for text in ("a", "b", "a", "c"):
        features.find(encoder, [text], device=CPU)
    assert ("b", False) not in features and all(text in features for text in (("a", False), ("c", False), ("", True)))
    many = features.find(encoder, ["d", "e", "f", "g"], device=CPU)  # more than are kept: all of them are returned
    assert len(many) == 4 and len(features) == 3
    assert ("", True) in features and ("g", False) in features
    features.size = 1
    assert len(features) == 2


def test_memory_is_bounded(encoder: Spelling) -> None:
    each = 8 * (2 * 4 + 8)  # embeddings and mask of eight tokens
    features = TextFeatures(size=100, max_bytes=3 * each)
    features.find(encoder, [""], null=True, device=CPU)
    for index in range(10):
        features.find(encoder, [f"letters{index}"], device=CPU)
        assert features.nbytes <= 3 * each
    assert len(features) == 4 and ("letters9", False) in features
    none = TextFeatures(max_bytes=0)
    none.find(encoder, ["letters0"], device=CPU)
    none.find(encoder, [""], null=True, device=CPU)
    assert len(none) == 1 and ("", True) in none


def test_size_zero_keeps_nothing(encoder: Spelling) -> None:
    features = TextFeatures(size=0)
    for _ in range(2):
        features.find(encoder, ["a"], device=CPU)
        features.find(encoder, [""], null=True, device=CPU)
    assert len(features) == 0 and len(encoder.asked) == 4
    for size in (-1, 1.5, True):
        with pytest.raises(ValueError, match="texts to keep"):
            features.size = size  # type: ignore[assignment]


def test_another_encoder_setting_or_device_forgets_everything(encoder: Spelling) -> None:
    features = TextFeatures()
    features.find(encoder, ["a", "b"], device=CPU)
    encoder.settings = "second"
    features.find(encoder, ["a"], device=CPU)
    assert len(encoder.asked) == 3 and len(features) == 1
    features.find(encoder, ["a"], device=torch.device("meta"))
    assert len(encoder.asked) == 4
    other = Spelling()
    features.find(other, ["a"], device=CPU)
    assert other.asked == [("a", False)]


def test_an_encoder_that_learns_is_asked_every_time(encoder: Spelling) -> None:
    features = TextFeatures()
    features.find(encoder, ["a"], device=CPU)
    encoder.settings = None
    for _ in range(2):
        features.find(encoder, ["a"], device=CPU)
    assert len(encoder.asked) == 3 and len(features) == 0


def test_features_that_are_not_finite_are_not_kept(encoder: Spelling) -> None:
    features = TextFeatures()
    encoder.value = float("nan")
    with pytest.raises(NonFiniteError, match="text encoder"):
        features.find(encoder, ["a"], device=CPU)
    assert len(features) == 0


def test_a_batch_is_padded_with_zeros_and_is_no_view(encoder: Spelling) -> None:
    features = TextFeatures()
    batch = stack(features.find(encoder, ["cat", "horses"], device=CPU), 7)
    assert batch.embeds.shape == (2, 7, 2)
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]
    assert (batch.embeds[batch.mask == 0] == 0).all() and (batch.embeds[batch.mask == 1] != 0).all()
    batch.embeds.fill_(5.0)
    assert (stack(features.find(encoder, ["cat"], device=CPU), 3).embeds != 5.0).all()


def test_lengths_of_a_call() -> None:
    cuda = torch.device("cuda")
    assert [call_length(longest, 300, CPU) for longest in (1, 64, 65, 300)] == [1, 64, 65, 300]
    assert [call_length(longest, 300, cuda) for longest in (1, 64, 65, 300)] == [64, 64, 128, 300]
    assert call_length(3, 20, cuda) == 20
    assert CUDA_LENGTHS == 64


def test_given_embeddings_are_cut_after_the_last_readable_token() -> None:
    embeds = torch.arange(24.0).reshape(2, 6, 2)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]])
    cut = trim_given(PromptEmbeds(embeds, mask), CPU)
    assert torch.equal(cut.embeds, embeds[:, :3]) and torch.equal(cut.mask, mask[:, :3])
    mask[0] = 0  # a row without a readable token has all of its tokens read
    assert trim_given(PromptEmbeds(embeds, mask), CPU).embeds.shape == embeds.shape


def whole(encoder: TextEncoder, prompts: list[str], chi: bool) -> PromptEmbeds:
    """The encoder's one call over all columns, without any cache."""
    tokens = tokenize_prompts(
        encoder.tokenizer,
        prompts,
        chi_prompt=encoder.chi_prompt if chi else "",
        model_max_length=encoder.model_max_length,
    )
    with torch.no_grad():
        return encoder.forward_tokens(*tokens)


@pytest.mark.parametrize("negative", [None, "blurry", f"{LONG}, and much else that a picture should not show"])
@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", LONG, ""]], ids=["one", "mixed"])
def test_pictures_are_those_of_the_full_length_path(
    pipeline: SanaPipeline, monkeypatch: pytest.MonkeyPatch, prompts: list[str], negative: str | None
) -> None:
    """The null caption has one real token and the prompts have more: its padding is read under their masks."""
    options = {"seed": 3, "negative_prompt": negative, **SHORT}
    pipeline.text_features.clear()
    lengths = []
    encode = pipeline.encode_prompts
    monkeypatch.setattr(
        pipeline, "encode_prompts", lambda *a, **k: lengths.append((out := encode(*a, **k)).embeds.shape[1]) or out
    )
    cached = [pipeline(prompts, **options) for _ in range(2)]
    full = pipeline.text_encoder.model_max_length
    assert lengths[0] < full and lengths[1] == full
    monkeypatch.setattr(
        pipeline, "encode_prompts", lambda texts, null=False, trim=False: whole(pipeline.text_encoder, texts, not null)
    )
    expected = pipeline(prompts, **options)
    assert torch.equal(*cached)
    torch.testing.assert_close(cached[0], expected, rtol=0, atol=1e-5)


def test_zeros_in_place_of_the_null_caption_s_padding_would_be_seen(pipeline: SanaPipeline) -> None:
    null = whole(pipeline.text_encoder, [""], False)
    zeros = {"negative_prompt_embeds": null.embeds * null.mask[..., None]}
    right, wrong = (pipeline("a cat", seed=3, **more, **SHORT) for more in ({}, zeros))
    assert (right - wrong).abs().max() > 1e-4


def test_the_encoder_runs_once_for_a_repeated_call(pipeline: SanaPipeline) -> None:
    pipeline.text_features.clear()
    calls = []
    hook = pipeline.text_encoder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = pipeline(["a cat", "a cat"], seed=1, **SHORT)
    asked = len(calls)
    assert asked >= 2 and torch.equal(pipeline(["a cat", "a cat"], seed=1, **SHORT), first)
    assert len(calls) == asked
    pipeline.text_features.size = 0
    assert torch.equal(pipeline(["a cat", "a cat"], seed=1, **SHORT), first)
    pipeline.text_features.size = 64
    assert len(calls) > asked
    hook.remove()


def test_public_embeddings_have_full_length_unless_trimmed(pipeline: SanaPipeline) -> None:
    full = pipeline.encode_prompts(["a cat", LONG])
    trimmed = pipeline.encode_prompts(["a cat", LONG], trim=True)
    length = int(full.mask.sum(dim=1).max())
    assert full.embeds.shape[1] == pipeline.text_encoder.model_max_length > length == trimmed.embeds.shape[1]
    assert torch.equal(full.embeds[:, :length], trimmed.embeds) and not full.embeds[:, length:].any()
    alone = pipeline.encode_prompts(["a cat"], trim=True)
    assert torch.equal(alone.embeds[0], full.embeds[0, : alone.embeds.shape[1]])


def test_new_encoders_dtypes_and_moves_drop_what_was_known(model_folder: Path) -> None:
    changed = SanaPipeline.from_pretrained(model_folder, device="cpu")
    before = changed.encode_prompts(["a cat"]).embeds
    assert len(changed.text_features) == 1
    changed.to(torch.bfloat16)
    assert len(changed.text_features) == 0
    assert changed.encode_prompts(["a cat"]).embeds.dtype == torch.bfloat16
    changed.to(torch.float32)
    rounded = changed.encode_prompts(["a cat"]).embeds
    assert not torch.equal(rounded, before)  # of weights that went through bf16
    changed.text_encoder = load_text_encoder(model_folder / "text_encoder", model_max_length=20, chi_prompt=CHI_PROMPT)
    assert len(changed.text_features) == 0
    torch.testing.assert_close(changed.encode_prompts(["a cat"]).embeds, before, rtol=1e-5, atol=1e-5)


def test_weights_that_are_loaded_into_the_encoder_are_noticed(model_folder: Path) -> None:
    changed = SanaPipeline.from_pretrained(model_folder, device="cpu")
    before = changed.encode_prompts(["a cat"]).embeds
    model = changed.text_encoder.model
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})
    after = changed.encode_prompts(["a cat"]).embeds
    assert not torch.equal(before, after)
    changed.text_features.clear()
    assert torch.equal(after, changed.encode_prompts(["a cat"]).embeds)


def test_a_file_of_embeddings_makes_the_same_picture(
    pipeline: SanaPipeline, model_folder: Path, tmp_path: Path
) -> None:
    prompts = ["a cat", LONG]
    save_prompt_embeds(tmp_path / "embeds.safetensors", prompts, pipeline.text_encoder)
    stored = SanaPipeline.from_pretrained(model_folder, device="cpu")
    stored.config.text_encoder.text_encoder_name = str(tmp_path / "embeds.safetensors")
    assert torch.equal(stored(prompts, seed=4, **SHORT), pipeline(prompts, seed=4, **SHORT))


def test_negative_embeddings_shorter_than_the_prompts_are_refused(pipeline: SanaPipeline) -> None:
    null = pipeline.encode_prompts([""], null=True).embeds
    needed = pipeline.encode_prompts(["a cat"], trim=True).embeds.shape[1]
    expected = pipeline("a cat", seed=2, **SHORT)
    assert torch.equal(pipeline("a cat", seed=2, negative_prompt_embeds=null[:, :needed], **SHORT), expected)
    with pytest.raises(ValueError, match=f"have {needed - 1} tokens and the prompts {needed}"):
        pipeline("a cat", seed=2, negative_prompt_embeds=null[:, : needed - 1], **SHORT)


@pytest.mark.gpu
def test_on_cuda_lengths_are_multiples_and_rows_equal_those_of_the_cpu(
    model_folder: Path, pipeline: SanaPipeline
) -> None:
    cuda = SanaPipeline.from_pretrained(model_folder, device="cuda", dtype="fp32")
    prompts = ["a cat", LONG, ""]
    cuda_embeds, embeds = (one.encode_prompts(prompts, trim=True) for one in (cuda, pipeline))
    limit = cuda.text_encoder.model_max_length
    assert cuda_embeds.embeds.shape[1] == min(limit, CUDA_LENGTHS)
    length = embeds.embeds.shape[1]
    assert torch.equal(cuda_embeds.mask[:, :length].cpu(), embeds.mask) and not cuda_embeds.mask[:, length:].any()
    torch.testing.assert_close(cuda_embeds.embeds[:, :length].cpu(), embeds.embeds, rtol=1e-3, atol=1e-3)
